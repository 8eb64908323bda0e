"""JSON bodies: requests are parsed within limits, validated by pydantic models and described for OpenAPI."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, TypeAdapter, ValidationError, model_validator
from pydantic_core import from_json
from starlette.responses import JSONResponse

from mmlora.errors import RequestError
from mmlora.utils.text import shorten

if TYPE_CHECKING:
    from mmlora.async_llm import PoolName

MAX_FIELDS: Final = 256
MAX_SMALL_BYTES: Final = 2**20
_BLOCK_BYTES: Final = 2**18
MAX_VALUES: Final = 2**20  # in one body: parsing more of them would delay other requests
MAX_REPORTED: Final = 8  # fields in one message
JSON_REASONS: Final[Mapping[str, str]] = {  # by the type that pydantic expected
    "dict": "Input should be an object",
    "list": "Input should be a valid array",
    "model": "Input should be an object",
}
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class _HashableFailFast(FailFast):
    """`FailFast` that can be part of a union, whose members are hashed."""

    def __hash__(self) -> int:
        return hash(type(self))


# A list whose validation stops at the first invalid entry: a body may contain a million of them.
FirstOnly = Annotated[list[T], _HashableFailFast()]


def has_no_effect(value: Any) -> bool:
    """Return whether an unknown field with this value can be ignored: it is null, false or empty."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


class Body(BaseModel):
    """JSON object that is refused if it has unknown fields, unless these are null, false or empty."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _ignore_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        return {name: value for name, value in fields.items() if name in cls.model_fields or not has_no_effect(value)}


class UTF8JSONResponse(JSONResponse):
    """JSON response in which `?` replaces characters that UTF-8 cannot encode.

    Directory names that are not UTF-8 contain such characters; one of them must not make a whole list fail.
    """

    def render(self, content: object) -> bytes:
        """Encode the content."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def pool_of(body: bytes) -> "PoolName":
    """Return the thread pool of `AsyncLLM` that parses a body: large ones one by one, since they stop all threads."""
    return "large_body" if len(body) > MAX_SMALL_BYTES else "input"


def parse_body(model: type[M], body: bytes) -> M:
    """Parse and validate a JSON body.

    Raises:
        RequestError: the body is not a JSON object, is too large, or does not fit the model.
    """
    fields = read_json(body, "body")
    if not isinstance(fields, dict):
        raise RequestError(f"the body must be a JSON object; received {shorten(fields, json.dumps)}", "body")
    if len(fields) > MAX_FIELDS:
        raise RequestError(f"the body has {len(fields)} fields; at most {MAX_FIELDS} are allowed", "body")
    return validate_fields(model, fields)


def validate_fields(model: type[M], fields: Mapping[str, Any]) -> M:
    """Validate the fields of a body or form.

    Raises:
        RequestError: naming all missing and unknown fields, or the first field whose value has the wrong type.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        for detail in error.errors(include_url=False)[:MAX_REPORTED]:
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, RequestError):  # of a validator; it names the field
                raise cause from None
        raise _field_error(model, error.errors(include_url=False)[:MAX_REPORTED]) from None


def read_json(text: str | bytes, name: str) -> Any:
    """Parse JSON from a client.

    Args:
        text: the JSON.
        name: `body`, or the form field of the JSON; for errors.

    Raises:
        RequestError: the text is not JSON, or has too many values.
    """
    content = text.encode() if isinstance(text, str) else text
    num_values = _max_num_values(content)
    if num_values > MAX_VALUES:
        raise RequestError(f"{name} has {num_values} commas and brackets; at most {MAX_VALUES} are allowed", name)
    try:
        return from_json(content)
    except ValueError as error:
        raise RequestError(f"{name} is not JSON: {error}", name) from None


def _max_num_values(content: bytes) -> int:
    """Return an upper bound on the number of values in JSON: strings may contain commas and brackets, too.

    Unlike `bytes.count`, numpy lets other threads run meanwhile. Blocks stay in the CPU's cache.
    """
    if len(content) <= MAX_VALUES:
        return sum(map(content.count, (b",", b"[", b"{")))
    values = np.frombuffer(content, np.uint8)
    blocks = (values[start : start + _BLOCK_BYTES] for start in range(0, len(values), _BLOCK_BYTES))
    return sum(int(np.count_nonzero(block == character)) for block in blocks for character in b",[{")


def body_schema(model: type[BaseModel], media_type: str = "application/json") -> dict[str, Any]:
    """Return the `openapi_extra` of a route that parses its body itself."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": json_schema(model)}}}}


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a type with its references inlined, so that it can be part of any document."""
    schema = TypeAdapter(kind).json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(definitions[node["$ref"].rpartition("/")[2]])
        return {name: inline(value) for name, value in node.items()}

    return dict(inline(schema))


def _field_error(model: type[BaseModel], problems: list[Any]) -> RequestError:
    own = [problem for problem in problems if len(problem["loc"]) == 1]  # without nested fields
    missing = [str(problem["loc"][0]) for problem in own if problem["type"] == "missing"]
    unknown = [str(problem["loc"][0]) for problem in own if problem["type"] == "extra_forbidden"]
    messages = []
    if missing:
        messages.append(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} required")
    if unknown:
        allowed = ", ".join(model.model_fields)
        messages.append(f"unknown field {', '.join(map(shorten, unknown))}; allowed are {allowed}")
    if messages:
        return RequestError("; ".join(messages), (missing + unknown)[0][:80])
    problem = problems[0]
    param, *place = problem["loc"] or ("body",)
    # Indices of lists only: pydantic also adds the names of union members, such as `list[str]`.
    path = ".".join(map(str, [param, *(part for part in place if isinstance(part, int))]))
    reason = JSON_REASONS.get(problem["type"].removesuffix("_type")) or problem["msg"]
    return RequestError(f"{path}: {reason}; received {shorten(problem['input'], json.dumps)}", str(param))
