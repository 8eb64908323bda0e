"""What the bodies of all endpoints that generate text have in common: fields, and how a wrong one is refused.

A field that would change the answer and is not supported is refused by name; OpenAI's fields that change nothing here
are accepted. What `model` and `lora` name is `server.models`' matter.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, JsonValue, ValidationError
from pydantic_core import from_json

from mmlora.errors import RequestError
from mmlora.utils.text import shorten

HARMLESS_FIELDS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Fields that others serve, and the values of theirs that change nothing.
NEUTRAL_EXTRAS: Mapping[str, tuple[JsonValue, ...]] = {
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "spaces_between_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
JSON_REASONS: Mapping[str, str] = {  # by the type that pydantic says was expected
    "dict": "Input should be an object",
    "list": "Input should be a valid array",
    "model": "Input should be an object",
}
MAX_FIELDS, MAX_BIASES = 256, 65536
MAX_VALUES = 2**20  # in one body: what parses more than that keeps everybody waiting
T = TypeVar("T")


class _FirstError(FailFast):
    """Can stand in a union, which wants hashes."""

    def __hash__(self) -> int:
        return hash(type(self))


# Of a list, the first wrong entry is the only one that is told: a body may hold a million of them.
FirstOnly = Annotated[list[T], _FirstError()]
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


def _check_biases(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"it has {len(value)} tokens; allowed are {MAX_BIASES}")
    return value


def read_json(text: str | bytes, name: str) -> Any:
    """Parse JSON that a client sent, unless it holds more values than any request has.

    Args:
        text: the JSON.
        name: of the field that it is.

    Raises:
        FieldError: it holds too many, or is not JSON.
    """
    content = text.encode() if isinstance(text, str) else text
    num_values = sum(map(content.count, (b",", b"[", b"{")))  # as many, or more where text holds these characters
    if num_values > MAX_VALUES:
        raise FieldError(f"{name} has {num_values} commas and brackets; allowed are {MAX_VALUES}", name)
    try:
        return from_json(content)
    except ValueError as error:
        raise FieldError(f"{name} is not JSON: {error}", name) from None


def read_fields(body: bytes) -> dict[str, Any]:
    """Parse a body, unless it has more fields than any request, each of which would be looked at.

    Raises:
        FieldError: it has too many, or is no JSON object.
    """
    content = read_json(body, "body")
    if not isinstance(content, dict):
        raise FieldError(f"the body must be a JSON object; received {shorten(content, json.dumps)}", "body")
    if len(content) > MAX_FIELDS:
        raise FieldError(f"the body has {len(content)} fields; allowed are {MAX_FIELDS}", "body")
    return content


def _check_stream_options(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"it has {len(value)} fields; allowed are {', '.join(StreamOptions.model_fields)}")
    return value


class StreamOptions(BaseModel):
    """`include_usage` asks for a last chunk with the token counts; obfuscation is never added."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(BaseModel):
    """The fields that every such endpoint reads; others are in `model_extra` and go through `check_other_fields`.

    `NEUTRAL_VALUES` are the values that fields which are not supported may have, beside `NEUTRAL_EXTRAS`.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    NEUTRAL_VALUES: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {}

    model: str | None = None
    lora: str | FirstOnly[dict[str, Any]] | None = None
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, BeforeValidator(_check_stream_options)] = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_check_biases)] = None
    stop: str | FirstOnly[str] | None = None
    stop_token_ids: FirstOnly[int] | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: FirstOnly[str] | None = None
    guided_grammar: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a request body.

        Raises:
            FieldError: the body is not JSON, a field has the wrong type, or is not supported.
        """
        fields = read_fields(body)
        try:
            request = cls.model_validate(fields)
        except ValidationError as error:
            raise first_problem(error) from None
        check_other_fields(request.model_extra or {}, {**NEUTRAL_EXTRAS, **cls.NEUTRAL_VALUES})
        if request.stream_options is not None and not request.stream:
            raise FieldError("stream_options needs stream=true", "stream_options")
        return request

    def given_sampling_options(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the request sets and all endpoints share."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        return {name: value for name, value in given.items() if value is not None}


def answer_limit(max_tokens: int | None, max_completion_tokens: int | None) -> int | None:
    """Return the longest answer in tokens, which has two names.

    Raises:
        FieldError: they contradict each other.
    """
    limits = {limit for limit in (max_tokens, max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise FieldError(
            f"max_tokens={shorten(max_tokens)} and max_completion_tokens={shorten(max_completion_tokens)} differ; "
            "give one of them",
            "max_completion_tokens",
        )
    return limits.pop() if limits else None


def check_other_fields(fields: Mapping[str, Any], neutral_values: Mapping[str, tuple[JsonValue, ...]]) -> None:
    """Refuse fields that would change the answer.

    Raises:
        FieldError: naming the first such field.
    """
    for name, value in fields.items():
        if name in HARMLESS_FIELDS or value in neutral_values.get(name, ()):
            continue
        shown = shorten(value, json.dumps)
        if name in neutral_values:
            allowed = " or ".join(json.dumps(neutral) for neutral in neutral_values[name])
            raise FieldError(f"{name}={shown} is not supported; allowed: {allowed}, or leave it out", name)
        message = f"unknown field {shorten(name)} with value {shown}; this server does not support it"
        raise FieldError(message, name[:80])


def first_problem(error: ValidationError) -> FieldError:
    """Say what is wrong with the first of the fields that are."""
    problem = error.errors(include_url=False)[0]
    # Pydantic adds the union member it tried (`str`, `list[str]`) after the field's own name.
    param = str(problem["loc"][0]) if problem["loc"] else "body"
    if problem["type"] == "missing":
        return FieldError(f"{param} is required", param)
    return FieldError(f"{param}: {reason_of(problem)}; received {shorten(problem['input'], json.dumps)}", param)


def reason_of(problem: Mapping[str, Any]) -> str:
    """What Pydantic says of a value, in the words of JSON where it has those of Python."""
    return JSON_REASONS.get(problem["type"].removesuffix("_type")) or str(problem["msg"])
