"""The `lora` field of a request: a name, or adapters with their scales."""

from typing import Any

from mmlora.checks import is_finite_number
from mmlora.server.protocol import FieldError

LoRAField = str | list[dict[str, Any]] | None


def parse_lora_field(lora: LoRAField) -> list[tuple[str, float]]:
    """Return the adapters that a `lora` field names, each with its scale.

    Raises:
        FieldError: an entry has another form, or an adapter is named twice.
    """
    if lora is None or isinstance(lora, str):
        return [(lora, 1.0)] if lora is not None else []
    found = [_entry(entry) for entry in lora]
    names = [name for name, _ in found]
    if len(set(names)) != len(names):
        raise FieldError(f"lora names an adapter twice: {', '.join(names)}; add the scales up", "lora")
    return found


def _entry(entry: dict[str, Any]) -> tuple[str, float]:
    unknown = sorted(set(entry) - {"name", "scale"})
    if unknown or not isinstance(entry.get("name"), str):
        raise FieldError(f"lora: {entry!r} must be {{'name': …}} or {{'name': …, 'scale': …}}", "lora")
    scale = entry.get("scale", 1)
    if not is_finite_number(scale):
        raise FieldError(f"lora: scale={scale!r} for {entry['name']!r}; it must be a finite number", "lora")
    return entry["name"], float(scale)
