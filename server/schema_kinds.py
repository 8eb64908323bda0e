"""Which kinds of JSON values a schema allows, as far as it says so plainly."""

from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 8  # of references and alternatives
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def kind_of(value: Any) -> str:
    """JSON schema's name for the type of a JSON value."""
    return _KINDS.get(type(value), "null")


def kinds_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """Return the types of the values that a schema allows; none where it does not say.

    Args:
        schema: of a value; anything that is no schema says nothing.
        root: what its local references (`#/…`) are relative to.
        depth: of the schema in another's alternatives and references.
    """
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return frozenset()
    named = schema.get("type")
    if named is not None:
        return frozenset(kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str))
    if "const" in schema:
        return frozenset([kind_of(schema["const"])])
    if isinstance(schema.get("enum"), list):
        return frozenset(map(kind_of, schema["enum"]))
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in _list(schema.get(key))]
    if "$ref" in schema:
        parts.append(_referred(schema["$ref"], root))
    return frozenset().union(*(kinds_of(part, root, depth + 1) for part in parts))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _referred(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a local reference means; None if it is another, or means nothing."""
    found: Any = root
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    for step in reference.removeprefix("#").split("/")[1:]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found
