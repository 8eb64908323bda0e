"""Base of the request models of all endpoints that generate text.

A field that would change the output and is not supported is refused by name. OpenAI fields that do not affect
the output are accepted.
"""

import functools
import json
import operator
from collections.abc import Collection, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, create_model

from mmlora.errors import ConstraintError, RequestError
from mmlora.sampling_params import SamplingParams
from mmlora.server.bodies import MAX_FIELDS, Body, FirstOnly, has_no_effect, parse_body
from mmlora.server.observability.request_id import CLIENT_ID
from mmlora.structured_outputs import CONSTRAINT_FIELDS, StructuredOutputsParams
from mmlora.utils.text import shorten

T = TypeVar("T")
# Fields of OpenAI and vLLM that do not affect the output.
HARMLESS_FIELDS: Final = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "return_mm_kwargs",
        "return_token_offsets",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "stream_interval",
        "user",
    }
)
# Fields of vLLM that are no longer supported, with their replacements.
REPLACED_FIELDS: Final = {
    f"guided_{kind}": f'structured_outputs={{"{kind}": …}}' for kind in ("json", "regex", "choice", "grammar")
}
# Fields of other servers that are not supported, with the values that have no effect, among them vLLM's defaults. Other
# fields may be null, false or empty.
NEUTRAL_EXTRAS: Final[Mapping[str, tuple[JsonValue, ...]]] = {
    **dict.fromkeys(REPLACED_FIELDS, (None,)),
    "include_reasoning": (None, True),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "return_tokens_as_token_ids": (None, False),
    "routed_experts_prompt_start": (None, 0),
    "spaces_between_special_tokens": (None, True),
    "thinking_token_budget": (None, -1),
    "use_beam_search": (None, False),
}
FORMAT_TYPES: Final = ("text", "json_object", "json_schema")
MAX_ENTRIES: Final = 65536  # entries of a mapping
# Fields of `SamplingParams` that each endpoint sets itself: name, type or meaning differ, or clients cannot set them.
ENDPOINT_FIELDS: Final = frozenset(
    "max_tokens logprobs prompt_logprobs structured_outputs kept_special_token_ids output_kind".split()
)


def _check_size(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"it has {len(value)} entries; the limit is {MAX_ENTRIES}")
    return value


BoundedDict = Annotated[dict[str, T], BeforeValidator(_check_size)]
JSON_CONTAINERS: Final[Mapping[Any, Any]] = {Sequence: FirstOnly, Mapping: BoundedDict}


def _json_type(hint: Any) -> Any:
    """Return the type that a field of `SamplingParams` has in a JSON body, where keys are strings."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return functools.reduce(operator.or_, map(_json_type, args))
    return JSON_CONTAINERS[origin][args[-1]] if origin in JSON_CONTAINERS else hint


def sampling_model(kind: type[SamplingParams], without: Collection[str] = ()) -> type[BaseModel]:
    """Build a model with the fields of sampling parameters, except `without` and those of `ENDPOINT_FIELDS`.

    All are optional and None by default, so that the model's own defaults apply.
    """
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in {*ENDPOINT_FIELDS, *without}}
    optional: dict[str, Any] = {name: (_json_type(hint) | None, None) for name, hint in hints.items()}
    return create_model("SamplingFields", **optional)


SamplingFields = sampling_model(SamplingParams)
SAMPLING_FIELDS: Final = tuple(SamplingFields.model_fields)


def _check_stream_options(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"it has {len(value)} fields; the allowed ones are {', '.join(StreamOptions.model_fields)}")
    return value


class StreamOptions(Body):
    """Options of a stream.

    Attributes:
        include_usage: add a last chunk with the token counts; by default if `continuous_usage_stats` is set.
        continuous_usage_stats: add to each chunk its choice's token counts so far, unless `include_usage` is false.
        include_obfuscation: accepted; obfuscation is never added.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class CommonFields(BaseModel):
    """Fields of all endpoints that generate text."""

    model: str | None = None
    lora: str | FirstOnly[dict[str, Any]] | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None


class GenerationRequest(SamplingFields, CommonFields):  # type: ignore[valid-type, misc]  # created at import
    """Fields of all endpoints with JSON bodies, including the sampling options.

    Pydantic collects other fields in `model_extra`; `check_other_fields` checks them. `NEUTRAL_VALUES` extends
    `NEUTRAL_EXTRAS` with fields that the endpoint does not support and their values without effect.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    NEUTRAL_VALUES: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {}

    stream_options: Annotated[StreamOptions | None, BeforeValidator(_check_stream_options)] = None
    mm_processor_kwargs: dict[str, Any] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    request_id: Annotated[str, Field(pattern=CLIENT_ID)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        options = self.stream_options or StreamOptions()
        return bool(options.continuous_usage_stats if options.include_usage is None else options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of the stream has the token counts so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse and check a request body.

        Raises:
            RequestError: the body is not JSON, or a field has the wrong type or is not supported.
        """
        request = parse_body(cls, body)
        check_other_fields(request.model_extra or {}, {**NEUTRAL_EXTRAS, **cls.NEUTRAL_VALUES})
        if request.stream_options is not None and request.stream_options.model_fields_set and not request.stream:
            raise RequestError("stream_options needs stream=true", "stream_options")
        return request

    def given_sampling_options(self) -> dict[str, Any]:
        """Return the sampling options that the request sets, except `ENDPOINT_FIELDS`."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        return {name: value for name, value in given.items() if value is not None}


def completion_limit(max_tokens: int | None, max_completion_tokens: int | None) -> int | None:
    """Return the maximum number of tokens of a completion, for which OpenAI has two fields.

    Raises:
        RequestError: both are given and differ.
    """
    limits = {limit for limit in (max_tokens, max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise RequestError(
            f"max_tokens={shorten(max_tokens)} and max_completion_tokens={shorten(max_completion_tokens)} differ; "
            "send only one of them",
            "max_completion_tokens",
        )
    return limits.pop() if limits else None


def check_other_fields(others: Mapping[str, Any], neutral_values: Mapping[str, tuple[JsonValue, ...]]) -> None:
    """Refuse fields that would change the output.

    Args:
        others: fields that are not in the request model.
        neutral_values: by field, the values without effect; those of other fields are null, false and empty ones.

    Raises:
        RequestError: naming the first such field.
    """
    for name, value in others.items():
        is_neutral = value in neutral_values[name] if name in neutral_values else has_no_effect(value)
        if is_neutral or name in HARMLESS_FIELDS:
            continue
        shown = shorten(value, json.dumps)
        if name in neutral_values:
            allowed = " or ".join(json.dumps(neutral) for neutral in neutral_values[name])
            instead = f"; use {REPLACED_FIELDS[name]}" if name in REPLACED_FIELDS else ", or leave it out"
            raise RequestError(f"{name}={shown} is not supported; allowed: {allowed}{instead}", name)
        message = f"unknown field {shorten(name)} with value {shown}; this server does not support it"
        raise RequestError(message, name[:80])


def read_constraint(
    request: GenerationRequest, text_format: Mapping[str, Any] | None = None
) -> StructuredOutputsParams | None:
    """Return the constraint on the output's form; None for any text.

    Args:
        request: has `response_format` and `structured_outputs`.
        text_format: `text.format` of the Responses API, which is flatter than `response_format`.

    Raises:
        ConstraintError: a field is malformed, or two are given.
    """
    found = []
    if request.response_format is not None:
        holder = request.response_format.get("json_schema")
        found.append(_read_format(request.response_format, "response_format", holder, "json_schema."))
    if text_format is not None:
        found.append(_read_format(text_format, "text.format", text_format))
    if request.structured_outputs is not None:
        found.append(_read_structured_outputs(request.structured_outputs))
    constraints = [constraint for constraint in found if constraint is not None]
    if len(constraints) > 1:
        names = " and ".join(constraint.name for constraint in constraints)
        raise ConstraintError(f"{names} are given; only one constraint is possible", constraints[1].name)
    return constraints[0] if constraints else None


def _read_format(value: Mapping[str, Any], name: str, holder: Any, place: str = "") -> StructuredOutputsParams | None:
    """Read a format whose schema is in `holder`, which is `place` in messages."""
    kind = value.get("type")
    if kind not in FORMAT_TYPES:
        shown = shorten(kind, json.dumps)
        raise ConstraintError(f"{name}.type is {shown}; it must be one of {', '.join(FORMAT_TYPES)}", name)
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True, name=name)
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ConstraintError(f"{name}.{place}schema is missing; it must be a JSON schema", name)
    return StructuredOutputsParams(json=schema, name=name)


def _read_structured_outputs(value: Mapping[str, Any]) -> StructuredOutputsParams:
    given = {key: content for key, content in value.items() if content is not None}
    unknown = [key for key in given if key not in CONSTRAINT_FIELDS]
    if unknown:
        raise ConstraintError(
            f"structured_outputs has the unknown field {shorten(unknown[0])}; allowed: {', '.join(CONSTRAINT_FIELDS)}",
            "structured_outputs",
        )
    return StructuredOutputsParams(**given)
