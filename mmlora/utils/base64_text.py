"""Base64 as clients send it: whitespace, missing padding and the URL-safe alphabet are accepted."""

import base64
import binascii
from typing import Final

from mmlora.errors import MediaError
from mmlora.utils.text import shorten

_HEAD_CHARS: Final = 1024


def decode_base64(text: str) -> bytes:
    """Decode a text.

    Raises:
        MediaError: it is not base64.
    """
    packed = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"malformed base64 media ({shorten(text)}): {error}") from error


def decode_head(text: str) -> bytes:
    """Decode the first bytes of a text, 512 or more unless it is shorter or begins with much whitespace.

    Raises:
        MediaError: they are not base64.
    """
    head = "".join(text[: 2 * _HEAD_CHARS].split())[:_HEAD_CHARS]
    return decode_base64(head[: len(head) // 4 * 4])


def decoded_size(text: str, start: int, limit: int) -> int:
    """Return the size of what a text encodes from `start` on; an upper bound if that is within the limit."""
    size = (len(text) - start) * 3 // 4
    if size <= limit:  # counting takes a while
        return size
    num_ignored = sum(text.count(character, start) for character in "= \t\r\n")
    return (len(text) - start - num_ignored) * 3 // 4
