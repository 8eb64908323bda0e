"""The `lora` field of a request: a name, or adapters with their scales."""

from typing import Any

from mmlora.lora.mix import MAX_MIX_PARTS
from mmlora.server.openai.protocol import FieldError
from mmlora.utils.text import is_finite_number, shorten

LoRAField = str | list[dict[str, Any]] | None


def parse_lora_field(lora: LoRAField) -> list[tuple[str, float]]:
    """Return the adapters that a `lora` field names, each with its scale.

    Raises:
        FieldError: there are too many entries, one has another form, or an adapter is named twice.
    """
    if lora is None or isinstance(lora, str):
        return [(lora, 1.0)] if lora is not None else []
    if len(lora) > MAX_MIX_PARTS:
        raise FieldError(f"lora holds {len(lora)} adapters; allowed are {MAX_MIX_PARTS}", "lora")
    found = [_entry(entry) for entry in lora]
    names = [name for name, _ in found]
    if len(set(names)) != len(names):
        raise FieldError(f"lora names an adapter twice: {shorten(names)}; add the scales up", "lora")
    return found


def _entry(entry: dict[str, Any]) -> tuple[str, float]:
    unknown = sorted(set(entry) - {"name", "scale"})
    if unknown or not isinstance(entry.get("name"), str):
        raise FieldError(f"lora: {shorten(entry)} must be {{'name': …}} or {{'name': …, 'scale': …}}", "lora")
    scale = entry.get("scale", 1)
    if not is_finite_number(scale):
        message = f"lora: scale={shorten(scale)} for {shorten(entry['name'])}; it must be a finite number"
        raise FieldError(message, "lora")
    return entry["name"], float(scale)
