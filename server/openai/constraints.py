"""Fields that say what an answer must look like: OpenAI's `response_format`, and what vLLM's users send."""

import json
from collections.abc import Mapping
from typing import Any

from mmlora.errors import ConstraintError
from mmlora.server.openai.protocol import GenerationRequest
from mmlora.structured_outputs import CONSTRAINT_FIELDS, StructuredOutputsParams
from mmlora.utils.text import shorten

FORMAT_TYPES = ("text", "json_object", "json_schema")


def read_constraint(
    request: GenerationRequest, text_format: Mapping[str, Any] | None = None
) -> StructuredOutputsParams | None:
    """What an answer must look like; None for any text.

    Args:
        request: its fields.
        text_format: `text.format` of a response, which is flatter than `response_format`.

    Raises:
        ConstraintError: a field has another form, or two are given.
    """
    guided = {f"guided_{kind}": getattr(request, f"guided_{kind}") for kind in ("json", "regex", "choice", "grammar")}
    read = [
        _from_response_format(request.response_format) if request.response_format is not None else None,
        _from_format(text_format, "text.format", text_format) if text_format is not None else None,
        _from_structured_outputs(request.structured_outputs) if request.structured_outputs is not None else None,
        *(_guided(name, value) for name, value in guided.items() if value is not None),
    ]
    found = [constraint for constraint in read if constraint is not None]
    if len(found) > 1:
        names = " and ".join(constraint.name for constraint in found)
        raise ConstraintError(f"{names} are given; an answer can follow one of them", found[1].name)
    return found[0] if found else None


def _from_response_format(value: Mapping[str, Any]) -> StructuredOutputsParams | None:
    return _from_format(value, "response_format", value.get("json_schema"), "json_schema.")


def _from_format(value: Mapping[str, Any], name: str, holder: Any, place: str = "") -> StructuredOutputsParams | None:
    """Read a format whose schema is in `holder`, which is called `place` in messages."""
    kind = value.get("type")
    if kind not in FORMAT_TYPES:
        shown = shorten(kind, json.dumps)
        raise ConstraintError(f"{name}.type is {shown}; allowed are {', '.join(FORMAT_TYPES)}", name)
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True, name=name)
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ConstraintError(f"{name}.{place}schema is missing; it must be a JSON schema", name)
    return StructuredOutputsParams(json=schema, name=name)


def _from_structured_outputs(value: Mapping[str, Any]) -> StructuredOutputsParams:
    unknown = [key for key, content in value.items() if key not in CONSTRAINT_FIELDS and content is not None]
    if unknown:
        raise ConstraintError(
            f"structured_outputs holds {shorten(unknown[0])}; allowed are {', '.join(CONSTRAINT_FIELDS)}",
            "structured_outputs",
        )
    return StructuredOutputsParams(**{key: content for key, content in value.items() if content is not None})


def _guided(name: str, value: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**{name.removeprefix("guided_"): value}, name=name)
