"""Bodies of the smaller endpoints, JSON objects of which every field is known; the OpenAPI schemas of all bodies."""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mmlora.server.openai.protocol import FieldError, read_fields, reason_of
from mmlora.utils.text import shorten

MAX_NAMED = 8  # fields in one message


class Body(BaseModel):
    """Fields of a body; any other is refused."""

    model_config = ConfigDict(strict=True, extra="forbid")


B = TypeVar("B", bound=Body)


def parse_body(kind: type[B], body: bytes) -> B:
    """Read a body.

    Raises:
        FieldError: it is not JSON, lacks fields, or has unknown ones or values of the wrong type; these are named.
    """
    fields = read_fields(body)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise _error_of(kind, problems[:MAX_NAMED]) from None


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a JSON body for the OpenAPI document."""
    return _request_body("application/json", kind)


def form_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a form for the OpenAPI document."""
    return _request_body("multipart/form-data", kind)


def _request_body(media_type: str, kind: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": _inlined_schema(kind)}}}}


def _inlined_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a body in one piece: a reference to its own definitions would resolve nowhere."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inlined(definitions[node["$ref"].rpartition("/")[2]])
        return {name: inlined(value) for name, value in node.items()}

    return dict(inlined(schema))


def _error_of(kind: type[Body], problems: list[Any]) -> FieldError:
    missing = [str(problem["loc"][0]) for problem in problems if problem["type"] == "missing"]
    unknown = [str(problem["loc"][0]) for problem in problems if problem["type"] == "extra_forbidden"]
    messages = []
    if missing:
        messages.append(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} required")
    if unknown:
        fields = ", ".join(kind.model_fields)
        messages.append(f"unknown field {', '.join(map(shorten, unknown))}; allowed are {fields}")
    if messages:
        return FieldError("; ".join(messages), (missing + unknown)[0][:80])
    problem = problems[0]
    param = str(problem["loc"][0]) if problem["loc"] else "body"
    place = ".".join(map(str, problem["loc"])) or "body"
    return FieldError(f"{place}: {reason_of(problem)}; received {shorten(problem['input'], json.dumps)}", param)
