"""Convert the `input` of the Responses API to chat messages."""

import contextlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from mmlora.errors import RequestError
from mmlora.inputs.content_parts import OBJECT_TYPES, has_no_content
from mmlora.processors.modalities import MODALITIES
from mmlora.server.bodies import has_no_effect
from mmlora.server.openai.output import Json
from mmlora.utils.text import shorten

REASONING_MESSAGE_KEYS = {"role", "content", "reasoning_content"}
INPUT_ROLES = ("system", "developer", "user", "assistant")
PART_FIELDS = {
    "input_text": ("type", "text", "prompt_cache_breakpoint"),
    "input_image": ("type", "image_url", "detail", "uuid", "prompt_cache_breakpoint"),
    "input_audio": ("type", "input_audio", "uuid"),
    "output_text": ("type", "text", "annotations", "logprobs"),
    "refusal": ("type", "refusal"),
}
# Parts of chats; `mmlora.inputs.content_parts` checks their content.
CHAT_PART_FIELDS = {
    part_type: ("type", *fields, "uuid", "detail", "format")
    for modality in MODALITIES.values()
    for part_type, fields in modality.part_types.items()
    if part_type not in (*PART_FIELDS, *OBJECT_TYPES)
}


def as_messages(instructions: str | None, given: Any) -> list[Json]:
    """Return the messages for `InputProcessor.chat_prompt`; media are passed through unchecked.

    Args:
        instructions: become the first message, with the system role.
        given: text, or a list of messages, reasoning, function calls and function call outputs.

    Raises:
        RequestError: naming the malformed item or part.
    """
    before = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*before, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise _must_be("input", given, "text or a list of at least one item")
    return [*before, *_messages(given)]


def _messages(items: list[Any]) -> list[Json]:
    messages: list[Json] = []
    thoughts: list[str] = []  # texts of the last reasoning items
    call_ids: set[str] = set()
    for index, item in enumerate(items):
        place = f"input[{index}]"
        if not isinstance(item, dict):
            raise _must_be(place, item, "an object")
        kind = item.get("type", "message")
        if kind != "reasoning":
            _move_reasoning(thoughts, messages)
        match kind:
            case "message":
                message = _message(item, place)
                if message["role"] == "assistant" and _is_only_reasoning(messages):
                    message |= messages.pop() | {"content": message["content"]}
                messages.append(message)
            case "reasoning":
                thoughts.append(_reasoning(item, place))
            case "function_call":
                call = _call(item, place)
                call_ids.add(call["id"])
                # Text and calls of one turn are one message.
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                messages.append(_output(item, call_ids, place))
            case _:
                allowed = (
                    "message, reasoning, function_call or function_call_output: this server has no other tools and "
                    "stores nothing"
                )
                raise _must_be(f"{place}.type", kind, allowed)
    _move_reasoning(thoughts, messages)
    return messages


def _message(item: Json, place: str) -> Json:
    role = item.get("role")
    if role not in INPUT_ROLES:
        raise _must_be(f"{place}.role", role, f"one of {', '.join(INPUT_ROLES)}")
    return {"role": role, "content": _content(item, "content", place)}


def _is_only_reasoning(messages: list[Json]) -> bool:
    """Return whether the last message is a reasoning item, which a message or call of the same turn may follow."""
    return bool(messages) and messages[-1].keys() == REASONING_MESSAGE_KEYS


def _move_reasoning(thoughts: list[str], messages: list[Json]) -> None:
    """Move the texts of reasoning items to a message, for the message or call that follows."""
    text = "\n\n".join(filter(None, thoughts))
    thoughts.clear()
    if text:
        messages.append({"role": "assistant", "content": None, "reasoning_content": text})


def _reasoning(item: Json, place: str) -> str:
    """Return the text of a reasoning item, or else its summary; encrypted content has none."""
    texts: list[str] = []
    for field, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        parts = item.get(field) or []
        if not isinstance(parts, list):
            raise _must_be(f"{place}.{field}", parts, "a list of parts")
        for index, part in enumerate(parts if not texts else []):
            where = f"{place}.{field}[{index}]"
            if not isinstance(part, dict) or part.get("type") != kind:
                raise _must_be(where, part, f"an object of the type {kind}")
            texts.append(_text(part, "text", where))
    return "\n\n".join(texts)


def _call(item: Json, place: str) -> Json:
    """Return a call in the form of `tool_calls`, its arguments parsed."""
    text, arguments = _text(item, "arguments", place), None
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(text)
    if not isinstance(arguments, dict):
        raise _must_be(f"{place}.arguments", text, "a JSON object, as text")
    function = {"name": _text(item, "name", place), "arguments": arguments}
    return {"id": _text(item, "call_id", place), "type": "function", "function": function}


def _output(item: Json, call_ids: Collection[str], place: str) -> Json:
    call_id = _text(item, "call_id", place)
    if call_id not in call_ids:
        raise _must_be(f"{place}.call_id", call_id, "the call_id of an earlier function_call")
    return {"role": "tool", "tool_call_id": call_id, "content": _content(item, "output", place)}


def _content(item: Json, field: str, place: str) -> str | list[Json]:
    """Return text or a list of parts."""
    content, place = item.get(field), f"{place}.{field}"
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _must_be(place, content, "text or a list of at least one part")
    return [_part(part, f"{place}[{index}]") for index, part in enumerate(content)]


def _part(part: Any, place: str) -> Json:
    if not isinstance(part, dict):
        raise _must_be(place, part, "an object")
    kind = part.get("type")
    if isinstance(kind, str) and kind in CHAT_PART_FIELDS:
        _check_fields(part, CHAT_PART_FIELDS[kind], place)
        return part
    if not isinstance(kind, str) or kind not in PART_FIELDS:
        raise _must_be(f"{place}.type", kind, f"one of {', '.join(PART_FIELDS)}")
    _check_fields(part, PART_FIELDS[kind], place)
    media = part.get("image_url" if kind == "input_image" else "input_audio")
    is_cached = part.get("uuid") is not None and has_no_content(media)
    match kind:
        case "input_image" | "input_audio" if is_cached:
            return {"type": kind, "uuid": part["uuid"]}
        case "input_image":
            url = part.get("image_url")
            url = _text(url, "url", f"{place}.image_url") if isinstance(url, dict) else _text(part, "image_url", place)
            return {"type": "image_url", "image_url": {"url": url}, "uuid": part.get("uuid")}
        case "input_audio":
            audio = part.get("input_audio")
            if not isinstance(audio, dict):
                raise _must_be(f"{place}.input_audio", audio, "an object with data and format")
            data = _text(audio, "data", f"{place}.input_audio")
            return {"type": "input_audio", "input_audio": {"data": data}, "uuid": part.get("uuid")}
        case "refusal":
            return {"type": "text", "text": _text(part, "refusal", place)}
        case _:
            return {"type": "text", "text": _text(part, "text", place)}


def _check_fields(received: Mapping[str, Any], allowed: Collection[str], place: str) -> None:
    for field, value in received.items():
        if field not in allowed and not has_no_effect(value):
            raise RequestError(f"{place} has the field {shorten(field)}, which this server does not support", place)


def _text(received: Mapping[str, Any], field: str, place: str) -> str:
    value = received.get(field)
    if not isinstance(value, str):
        raise _must_be(f"{place}.{field}", value, "a string")
    return value


def _must_be(place: str, received: Any, allowed: str) -> RequestError:
    return RequestError(f"{place}={shorten(received, json.dumps)} must be {allowed}", place)
