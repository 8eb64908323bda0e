"""Models of messages and responses, from which FastAPI writes the OpenAPI document.

They only describe: requests are checked by the protocol modules and `mmlora.inputs`, responses built by the output
modules.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field

from mmlora.server.bodies import json_schema

FinishReason = Literal["stop", "length", "tool_calls"]


class MediaURL(BaseModel):
    """Address of media."""

    url: str = Field(description="data:, http:, https: or file:")


class AudioData(BaseModel):
    """Audio inside a request; its format is detected from the data."""

    data: str = Field(description="base64")
    format: str | None = None


class TextPart(BaseModel):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageURLPart(BaseModel):
    """Image of a message."""

    type: Literal["image_url"]
    image_url: MediaURL


class AudioURLPart(BaseModel):
    """Audio of a message, as a URL."""

    type: Literal["audio_url"]
    audio_url: MediaURL


class InputAudioPart(BaseModel):
    """Audio of a message."""

    type: Literal["input_audio"]
    input_audio: AudioData


class Message(BaseModel):
    """Message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | ImageURLPart | AudioURLPart | InputAudioPart] | None = None


class ItemTextPart(BaseModel):
    """Text of an input item."""

    type: Literal["input_text", "output_text"]
    text: str


class ItemImagePart(BaseModel):
    """Image of an input item."""

    type: Literal["input_image"]
    image_url: str


class Item(BaseModel):
    """Input item of a response."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ItemTextPart | ItemImagePart | InputAudioPart], Field(min_length=1)]


MESSAGES: Final = json_schema(Annotated[list[Message], Field(min_length=1)])
INPUT: Final = json_schema(str | Annotated[list[Item], Field(min_length=1)])


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


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]


class CompletionChoice(Choice):
    """One completion."""

    text: str
    logprobs: CompletionLogprobs | None


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
    """Message or function call."""

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
    """What a model card has on an adapter."""

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


# `responses` of routes: errors of any route, and other forms than JSON.
Responses = dict[int | str, dict[str, Any]]
ERROR: Final = {"content": {"application/json": {"schema": json_schema(ErrorResponse)}}}
ERRORS: Final[Responses] = {"4XX": ERROR, "5XX": ERROR}
EVENTS: Final = {"text/event-stream": {"schema": json_schema(StreamEvent)}}
OR_EVENTS: Final[Responses] = {200: {"content": EVENTS}}
OR_EVENTS_OR_TEXT: Final[Responses] = {200: {"content": {**EVENTS, "text/plain": {"schema": {"type": "string"}}}}}
