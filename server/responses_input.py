"""The `input` of a response as the messages of a chat, which is how the model is asked."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from mmlora.server.protocol import FieldError, shorten

Json = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS = ("type", "role", "content", "id", "status", "phase")
PART_FIELDS = {
    "input_text": ("type", "text", "prompt_cache_breakpoint"),
    "input_image": ("type", "image_url", "detail", "prompt_cache_breakpoint"),
    "input_audio": ("type", "input_audio"),
    "output_text": ("type", "text", "annotations", "logprobs"),
    "refusal": ("type", "refusal"),
}


def as_messages(instructions: str | None, given: Any) -> list[Json]:
    """Return the messages that `mmlora.chat.render_chat` takes; their media are not looked at.

    Args:
        instructions: become a system message before all others.
        given: text, or a list of messages.

    Raises:
        FieldError: naming the item or the part that has another form.
    """
    before = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*before, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise _must_be("input", given, "text or a list of at least one item")
    return [*before, *(_message(item, f"input[{index}]") for index, item in enumerate(given))]


def _message(item: Any, place: str) -> Json:
    if not isinstance(item, dict):
        raise _must_be(place, item, "an object")
    kind, role, content = item.get("type", "message"), item.get("role"), item.get("content")
    if kind != "message":
        raise _must_be(f"{place}.type", kind, "message: there are no tools, and no response is kept")
    if role not in ROLES:
        raise _must_be(f"{place}.role", role, f"one of {', '.join(ROLES)}")
    _check_fields(item, MESSAGE_FIELDS, place)
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not content:
        raise _must_be(f"{place}.content", content, "text or a list of at least one part")
    return {"role": role, "content": [_part(part, f"{place}.content[{index}]") for index, part in enumerate(content)]}


def _part(part: Any, place: str) -> Json:
    if not isinstance(part, dict):
        raise _must_be(place, part, "an object")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in PART_FIELDS:
        raise _must_be(f"{place}.type", kind, f"one of {', '.join(PART_FIELDS)}")
    _check_fields(part, PART_FIELDS[kind], place)
    match kind:
        case "input_image":
            return {"type": "image_url", "image_url": {"url": _text(part, "image_url", place)}}
        case "input_audio":
            audio = part.get("input_audio")
            if not isinstance(audio, dict):
                raise _must_be(f"{place}.input_audio", audio, "an object with data and format")
            return {"type": "input_audio", "input_audio": {"data": _text(audio, "data", f"{place}.input_audio")}}
        case "refusal":
            return {"type": "text", "text": _text(part, "refusal", place)}
        case _:
            return {"type": "text", "text": _text(part, "text", place)}


def _check_fields(received: Mapping[str, Any], allowed: Collection[str], place: str) -> None:
    for field, value in received.items():
        if field not in allowed and value is not None:
            raise FieldError(f"{place} has the field {shorten(field)}, which this server does not support", place)


def _text(received: Mapping[str, Any], field: str, place: str) -> str:
    value = received.get(field)
    if not isinstance(value, str):
        raise _must_be(f"{place}.{field}", value, "a string")
    return value


def _must_be(place: str, received: Any, allowed: str) -> FieldError:
    return FieldError(f"{place}={shorten(received, json.dumps)} must be {allowed}", place)
