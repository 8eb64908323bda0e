"""The body of `POST /v1/chat/completions`: parsed, checked, and turned into sampling options.

A field that would change the answer and is not supported is refused by name; OpenAI's fields that change nothing here
are accepted. What `messages` may hold is `mmlora.chat`'s matter, what `model` and `lora` name is `server.models`'.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from mmlora.errors import RequestError

HARMLESS_FIELDS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
NEUTRAL_VALUES: Mapping[str, tuple[JsonValue, ...]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS = frozenset({"role", "content", "name", "refusal"})
SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
)


class FieldError(RequestError):
    """A request field is wrong; `param` is its name."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class StreamOptions(BaseModel):
    """`include_usage` asks for a last chunk with the token counts; obfuscation is never added."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatCompletionRequest(BaseModel):
    """The fields that this server reads; the rest is in `model_extra` and goes through `check_other_fields`."""

    model_config = ConfigDict(strict=True, extra="allow")

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    lora: str | list[dict[str, Any]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_options(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the request sets.

        Raises:
            FieldError: two fields contradict each other.
        """
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        options = {name: value for name, value in given.items() if value is not None}
        return {**options, "max_tokens": self._answer_limit(), "logprobs": self._num_logprobs()}

    def _answer_limit(self) -> int | None:
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise FieldError(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ; "
                "give one of them",
                "max_completion_tokens",
            )
        return limits.pop() if limits else None

    def _num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise FieldError(f"top_logprobs={self.top_logprobs} needs logprobs=true", "top_logprobs")
        return None


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Read a request body.

    Raises:
        FieldError: the body is not JSON, a field has the wrong type, or is not supported.
    """
    try:
        request = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _first_problem(error) from None
    check_other_fields(request.model_extra or {})
    for index, message in enumerate(request.messages):
        check_message(message, f"messages[{index}]")
    if request.stream_options is not None and not request.stream:
        raise FieldError("stream_options needs stream=true", "stream_options")
    return request


def check_other_fields(fields: Mapping[str, Any]) -> None:
    """Refuse fields that would change the answer.

    Raises:
        FieldError: naming the first such field.
    """
    for name, value in fields.items():
        if name in HARMLESS_FIELDS or value in NEUTRAL_VALUES.get(name, ()):
            continue
        shown = shorten(value, json.dumps)
        if name in NEUTRAL_VALUES:
            allowed = " or ".join(json.dumps(neutral) for neutral in NEUTRAL_VALUES[name])
            raise FieldError(f"{name}={shown} is not supported; allowed: {allowed}, or leave it out", name)
        message = f"unknown field {shorten(name)} with value {shown}; this server does not support it"
        raise FieldError(message, name[:80])


def check_message(message: Mapping[str, Any], name: str) -> None:
    """Refuse a message with an unknown role, without content, or with fields that would change the answer.

    Raises:
        FieldError: naming the message and what is wrong with it.
    """
    role = message.get("role")
    if role not in ROLES:
        raise FieldError(f"{name}.role={shorten(role, json.dumps)} must be one of {', '.join(ROLES)}", "messages")
    for field, value in message.items():
        if field not in MESSAGE_FIELDS and value not in (None, []):
            raise FieldError(f"{name} has the field {shorten(field)}, which this server does not support", "messages")
    if message.get("content") in (None, []) and role != "assistant":
        raise FieldError(f"{name}.content is missing or empty; it must be text or a list of parts", "messages")


def _first_problem(error: ValidationError) -> FieldError:
    problem = error.errors(include_url=False)[0]
    # Pydantic adds the union member it tried (`str`, `list[str]`) after the field's own name.
    param = str(problem["loc"][0]) if problem["loc"] else "body"
    if problem["type"] == "missing":
        return FieldError(f"{param} is required", param)
    if problem["type"] == "json_invalid":
        return FieldError(f"the body is not JSON: {problem['ctx']['error']}", param)
    return FieldError(f"{param}: {problem['msg']}; received {shorten(problem['input'], json.dumps)}", param)


def shorten(value: Any, show: Callable[[Any], str] = repr) -> str:
    """Show what a client sent in at most 80 characters."""
    text = show(value)
    return text if len(text) <= 80 else text[:77] + "..."
