"""Models of messages and responses, from which the OpenAPI document is generated.

They only describe. The protocol modules and `mmlora.inputs` check requests; the output modules build responses.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from mmlora.processors.modalities import MODALITIES
from mmlora.server.bodies import body_schema, json_schema

JsonSchema = dict[str, Any]
FinishReason = Literal["stop", "length", "tool_calls"]


class MediaURL(BaseModel):
    """Address of media."""

    url: str = Field(description="data:, http:, https: or file:")


class EncodedMedia(BaseModel):
    """Media inside a request; the format is detected from the data."""

    data: str = Field(description="base64")
    format: str | None = None


def _part(part_type: str, content: Any, field: str | None = None) -> JsonSchema:
    """Describe a content part whose content is in `field`, by default the field named like the type."""
    properties = {"type": {"const": part_type}, field or part_type: json_schema(content)}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _content(parts: list[JsonSchema], min_items: int) -> WithJsonSchema:
    """Describe the content of a message: a string or a list of parts."""
    part_list = {"type": "array", "minItems": min_items, "items": {"anyOf": parts}}
    return WithJsonSchema({"anyOf": [json_schema(str), part_list]})


def _media_part(part_type: str, fields: Iterable[str]) -> JsonSchema:
    """Describe a part whose media are in one of the fields, or are the cached item of its uuid."""
    properties = {"type": {"const": part_type}, **{field: MEDIA_FIELDS[field] for field in fields}, "uuid": UUID}
    return {"type": "object", "properties": properties, "required": ["type"]}


_URL: Final = json_schema(str | MediaURL)
_ANY_FORM: Final = {"type": "string", "description": "data:, http:, https: or file: URL, absolute path, or base64"}
UUID: Final = {"type": "string", "description": "the client's name for the item in the media cache"}
MEDIA_FIELDS: Final = {
    "image_url": _URL,
    "audio_url": _URL,
    "input_audio": json_schema(EncodedMedia),
    **dict.fromkeys(("image", "audio", "url", "path"), _ANY_FORM),
    "base64": json_schema(str),
}
CHAT_PARTS: Final = [_part("text", str)] + [
    _media_part(part_type, fields)
    for modality in MODALITIES.values()
    for part_type, fields in modality.part_types.items()
    if all(field in MEDIA_FIELDS for field in fields)  # Python objects cannot be sent
]
INPUT_PARTS: Final = [
    _part("input_text", str, "text"),
    _part("output_text", str, "text"),
    _part("input_image", str, "image_url"),
    _part("input_audio", EncodedMedia),
]


class Message(BaseModel):
    """Message of a chat."""

    role: str = Field(
        pattern=r"^[\w.-]{1,64}$",
        description="system, developer, user, assistant, tool, or another role of the chat template",
    )
    content: Annotated[Any, _content(CHAT_PARTS, 0)] | None = None


class InputMessage(BaseModel):
    """Message in the input of a response."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, _content(INPUT_PARTS, 1)]


class ReasoningPart(BaseModel):
    """Text of reasoning, or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class Reasoning(BaseModel):
    """Reasoning of an earlier response."""

    type: Literal["reasoning"]
    content: list[ReasoningPart] | None = None
    summary: list[ReasoningPart] | None = None


class FunctionCall(BaseModel):
    """Function call of an earlier response."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="a JSON object")


class FunctionCallOutput(BaseModel):
    """Result of a function call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[Any, _content(INPUT_PARTS, 1)]


MESSAGES: Final = json_schema(Annotated[list[Message], Field(min_length=1)])
InputItem = InputMessage | Reasoning | FunctionCall | FunctionCallOutput
INPUT: Final = json_schema(str | Annotated[list[InputItem], Field(min_length=1)])


class StreamEvent(BaseModel):
    """Server-sent event; the data is JSON, or `[DONE]` at the end."""

    data: str


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Error in OpenAI's form."""

    error: ErrorDetails


class UsedLoRA(BaseModel):
    """Adapter of a response and why it was chosen."""

    adapter: str | None
    digest: str | None
    reason: str
    warning: str | None


class CachedTokens(BaseModel):
    """Prompt tokens found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


PromptLogprobs = list[dict[str, Any] | None] | None  # by token id, for each token of the prompt


class Choice(BaseModel):
    """One of `n` completions."""

    index: int
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChoicesResponse(BaseModel):
    """Response with numbered choices."""

    id: str
    created: int
    model: str
    lora: UsedLoRA
    usage: Usage


class TokenLogprob(BaseModel):
    """Log probability of a token."""

    token: str
    logprob: float


class ChatLogprobs(BaseModel):
    """Log probabilities of a chat completion."""

    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    """Message of the model."""

    role: Literal["assistant"]
    content: str | None
    refusal: None


class ChatChoice(Choice):
    """One chat completion."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(ChoicesResponse):
    """Response of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]


class CompletionChoice(Choice):
    """One completion."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: PromptLogprobs


class Completion(ChoicesResponse):
    """Response of `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ReasoningTokens(BaseModel):
    """Details of output tokens."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class OutputItem(BaseModel):
    """Reasoning, message or function call."""

    id: str
    type: str
    status: str


class ResponseObject(BaseModel):
    """Response of `/v1/responses`."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage
    metadata: dict[str, str]
    lora: UsedLoRA


class TokenUsage(BaseModel):
    """Token counts of a transcription."""

    type: Literal["tokens"]
    input_tokens: int
    output_tokens: int
    total_tokens: int


class DurationUsage(BaseModel):
    """Length of the transcribed audio."""

    type: Literal["duration"]
    seconds: float


class Transcription(BaseModel):
    """Response of `/v1/audio/transcriptions` and `/v1/audio/translations`."""

    text: str
    finish_reason: FinishReason
    usage: TokenUsage | DurationUsage
    lora: UsedLoRA


class AdapterDetails(BaseModel):
    """Adapter in a model card."""

    name: str
    lora_int_id: int
    digest: str | None
    default_for: str | None
    matched: int
    parts: dict[str, int]
    unmatched: list[str]
    problem: str | None


class ModelCard(BaseModel):
    """Entry of `/v1/models`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[dict[str, Any]]
    adapter: AdapterDetails | None


class ModelList(BaseModel):
    """Response of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


ERROR: Final = {"content": {"application/json": {"schema": json_schema(ErrorResponse)}}}
ERRORS: Final[dict[int | str, dict[str, Any]]] = {"4XX": ERROR, "5XX": ERROR}
EVENTS: Final = {"text/event-stream": {"schema": json_schema(StreamEvent)}}
PLAIN_TEXT: Final = {"text/plain": {"schema": {"type": "string"}}}


def described(request: type[BaseModel], response: type[BaseModel], *, is_form: bool = False) -> dict[str, Any]:
    """Return the options of a generating route that describe its body and response, streams included.

    Args:
        request: fields of the body, which is JSON or, with `is_form`, a form.
        response: JSON response; with `is_form`, the response may also be plain text.
    """
    return {
        "openapi_extra": body_schema(request, "multipart/form-data" if is_form else "application/json"),
        "response_model": response,
        "responses": {200: {"content": {**EVENTS, **PLAIN_TEXT} if is_form else EVENTS}},
    }
