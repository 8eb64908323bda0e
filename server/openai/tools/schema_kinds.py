"""Which kinds of JSON values a schema allows, as far as it says so plainly."""

from collections.abc import Mapping
from typing import Any

MAX_SCHEMA_PARTS = 64  # alternatives and references of one schema that are looked at
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def kind_of(value: Any) -> str:
    """JSON schema's name for the type of a JSON value."""
    return _KINDS.get(type(value), "null")


def kinds_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Return the types of the values that a schema allows; none where it does not say.

    Args:
        schema: of a value; anything that is no schema says nothing.
        root: what its local references (`#/…`) are relative to.
    """
    found: set[str] = set()
    parts = [schema]  # it, and its alternatives and what they refer to, each once
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        more: list[Any] = []
        if (named := part.get("type")) is not None:
            found.update(kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str))
        elif "const" in part:
            found.add(kind_of(part["const"]))
        elif isinstance(part.get("enum"), list):
            found.update(map(kind_of, part["enum"]))
        else:
            more = [one for key in ("anyOf", "oneOf", "allOf") for one in _list(part.get(key))]
            more += [_referred(part["$ref"], root)] if "$ref" in part else []
        known = {id(one) for one in parts}
        parts += [one for one in more if id(one) not in known][: MAX_SCHEMA_PARTS - len(parts)]
    return frozenset(found)


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
