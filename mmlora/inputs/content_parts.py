"""Content parts of chat messages, as OpenAI, vLLM, transformers and Qwen write them: text, or references to media.

Nothing is fetched or decoded here; `MediaLoader` decides whether a URL or a file may be read, in every form alike.
"""

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from mmlora.errors import RequestError
from mmlora.processors.media.loader import MediaReference, sniff_modality, why_unsupported
from mmlora.processors.modalities import PART_MODALITIES, ContentForm
from mmlora.utils.text import describe_type, shorten

Part = str | MediaReference

TEXT_FIELDS: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # by type
PART_TYPES: Final = (*TEXT_FIELDS, *PART_MODALITIES)
OBJECT_TYPES: Final = ("image_pil",)  # of vLLM, for Python objects only

_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]{1,31}:", re.IGNORECASE)  # one letter is a drive of Windows
_HEAD_CHARS: Final = 128  # of base64; enough to recognize a format
_ANY_FORM: Final = "a URL (data:, http:, https: or file:), an absolute path, or base64 of a supported format"


def read_part(part: Any, *, allows_objects: bool = True) -> Part:
    """Return the text of a content part, or the reference to its media.

    Args:
        part: a string, or a mapping whose `type` may be missing if its fields tell it.
        allows_objects: whether media may be Python objects, such as a PIL image.

    Raises:
        RequestError: the part is malformed, or of an unsupported type.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestError(f"content part is {describe_type(part)}; it must be a string or an object with a type")
    kind = _allowed_type(part, [name for name in PART_TYPES if allows_objects or name not in OBJECT_TYPES])
    if kind in TEXT_FIELDS:
        return _text_of(part, kind)
    modality = PART_MODALITIES[kind]
    field, value = _content_of(part, kind)
    uuid = part.get("uuid")
    if uuid is not None and has_no_content(value):
        return MediaReference(modality.name, None, "object", uuid)
    if value is None:
        fields = " or ".join(modality.part_types[kind])
        raise RequestError(f"content part of type {kind!r} lacks its content: it needs {fields}")
    content, form = _read_content(value, field, f"{field} of a content part of type {kind!r}", allows_objects)
    return MediaReference(modality.name, content, form, uuid)


def type_of(part: Mapping[Any, Any]) -> Any:
    """Return the type of a part, or without one the name of the first field that is named like a type, as vLLM does."""
    kind = part.get("type")
    return next((name for name in PART_TYPES if name in part), None) if kind is None else kind


def has_no_content(value: Any) -> bool:
    """Return whether a media field is null or an object without content, as next to the uuid of a cached item."""
    return value is None or (isinstance(value, Mapping) and value.get("url") is value.get("data") is None)


def _allowed_type(part: Mapping[Any, Any], allowed: Sequence[str]) -> str:
    kind = type_of(part)
    if isinstance(kind, str) and kind in allowed:
        return kind
    reason = next(filter(None, (why_unsupported(str(name)) for name in (kind, *part))), None)
    shown = shorten(kind) if isinstance(kind, str) else describe_type(kind)
    raise RequestError(f"content part of type {shown}; {reason or 'allowed: ' + ', '.join(allowed)}")


def _text_of(part: Mapping[str, Any], kind: str) -> str:
    field = TEXT_FIELDS[kind]
    value = part.get(field)
    if value is None:
        raise RequestError(f"content part of type {kind!r} lacks its {field!r} field")
    if not isinstance(value, str):
        raise RequestError(f"content part of type {kind!r} has {describe_type(value)}; it must be a string")
    return value


def _content_of(part: Mapping[str, Any], kind: str) -> tuple[str, Any]:
    """Return the name and the value of the field that has the media of a part; the value is None without one.

    Raises:
        RequestError: several have one.
    """
    fields = PART_MODALITIES[kind].part_types[kind]
    given = [name for name in fields if part.get(name) is not None]
    if len(given) > 1:
        raise RequestError(f"content part of type {kind!r} has {' and '.join(given)}; send one of them")
    field = given[0] if given else fields[0]
    return field, part.get(field)


def _read_content(value: Any, field: str, name: str, allows_objects: bool) -> tuple[Any, ContentForm]:
    """Return the content of a media reference and its form.

    Args:
        value: of the field; not None.
        field: its name.
        name: the field in errors.
        allows_objects: see `read_part`.
    """
    if field == "input_audio":
        return _base64(_string_in(value, "data", name, "an object with 'data' as a string"))
    if field.endswith("_url"):
        return _string_in(value, "url", name, "a string, or an object with 'url' as a string"), "url"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Mapping):
        value = _string_in(value, "url", name, _ANY_FORM)
    if not isinstance(value, str):
        if allows_objects and field not in ("url", "path", "base64"):
            return value, "object"
        raise RequestError(f"{name} is {describe_type(value)}; it must be {_ANY_FORM}")
    if field in OBJECT_TYPES:
        raise RequestError(f"{name} is a string; use image_url for a URL")
    return _base64(value) if field == "base64" else _any_form(value, name)


def _string_in(value: Any, key: str, name: str, allowed: str) -> str:
    """Return the string `value[key]`, or of a URL the string itself."""
    found = value.get(key) if isinstance(value, Mapping) else value
    if isinstance(found, str) and (found is not value or key == "url"):
        return found
    received = f"has {describe_type(found)} as {key!r}" if isinstance(value, Mapping) else f"is {describe_type(value)}"
    raise RequestError(f"{name} {received}; it must be {allowed}")


def _base64(text: str) -> tuple[str, ContentForm]:
    return (text, "url") if text[:5].lower() == "data:" else (text, "base64")


def _any_form(text: str, name: str) -> tuple[str, ContentForm]:
    """Tell a URL, base64 and a path apart by the text alone; base64 of a JPEG begins with `/9j/`."""
    if _SCHEME.match(text):
        return text, "url"
    if _is_encoded_media(text):
        return text, "base64"
    if text.startswith("/"):
        return f"file://{quote(text, errors='surrogatepass')}", "url"
    raise RequestError(f"{name} is {shorten(text, json.dumps)}; it must be {_ANY_FORM}")


def _is_encoded_media(text: str) -> bool:
    head = "".join(text[:_HEAD_CHARS].split()).replace("-", "+").replace("_", "/")
    try:
        return sniff_modality(base64.b64decode(head[: len(head) // 4 * 4], validate=True)) is not None
    except (binascii.Error, ValueError):
        return False
