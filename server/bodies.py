"""Bodies of the smaller endpoints: JSON objects of which every field is known."""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mmlora.server.protocol import FieldError, read_fields, reason_of, shorten

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


def body_schema(*kinds: type[Body]) -> dict[str, Any]:
    """Describe a body for the OpenAPI document; it may be of any of these kinds."""
    schemas = [inlined_schema(kind) for kind in kinds]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a form for the OpenAPI document."""
    content = {"multipart/form-data": {"schema": inlined_schema(kind)}}
    return {"requestBody": {"required": True, "content": content}}


def inlined_schema(kind: type[BaseModel]) -> dict[str, Any]:
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
