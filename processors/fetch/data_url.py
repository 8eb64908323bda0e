"""Read media from `data:` URLs and base64; the claimed length is checked before anything is decoded."""

import base64
import binascii
from urllib.parse import unquote, unquote_to_bytes

from mmlora.errors import MediaError
from mmlora.processors.media.decoding import load_media
from mmlora.processors.media.items import DEFAULT_LIMITS, MediaItem, MediaLimits
from mmlora.utils.text import shorten

_MAX_SCHEME = 32
_SCHEMES = "data:, http:, https: and file:"  # `MediaLoader` reads the others


def load_data_url(url: str, limits: MediaLimits = DEFAULT_LIMITS, *, expected: str | None = None) -> MediaItem:
    """Load a `data:` URL (RFC 2397), base64 or percent-encoded; its MIME type is not trusted.

    Raises:
        MediaError: another scheme, malformed, too large, or unusable content.
    """
    if not isinstance(url, str):
        raise MediaError(f"a media URL must be a string, got a {type(url).__name__}")
    scheme, colon, _ = url[:_MAX_SCHEME].partition(":")
    if not colon or scheme.lower() != "data":
        named = f"scheme {scheme.lower()!r}" if colon else "no scheme"
        raise MediaError(f"media URL with {named} ({shorten(url)}): allowed are {_SCHEMES} URLs")
    comma = url.find(",", 0, 1024)
    if comma < 0:
        raise MediaError(f"malformed data: URL ({shorten(url)}): no comma after the media type")
    if url[5:comma].rstrip().lower().endswith(";base64"):
        if url.find("%", comma) < 0:
            _check_base64_claim(url, comma + 1, limits)
            return load_base64(url[comma + 1 :], limits, expected=expected)
        _check_claim((len(url) - comma - 1) // 4, limits)  # at least: every character may be written as three
        return load_base64(unquote(url[comma + 1 :]), limits, expected=expected)
    _check_claim(len(url) - comma - 1 - 2 * url.count("%", comma), limits)
    return load_media(unquote_to_bytes(url[comma + 1 :]), limits, expected=expected)


def load_base64(data: str | bytes, limits: MediaLimits = DEFAULT_LIMITS, *, expected: str | None = None) -> MediaItem:
    """Load base64 content; whitespace and missing padding are forgiven, the URL-safe alphabet is accepted.

    Raises:
        MediaError: not base64, too large, or unusable content.
    """
    if not isinstance(data, str | bytes):
        raise MediaError(f"base64 media must be a string, got a {type(data).__name__}")
    try:
        text = data.decode("ascii") if isinstance(data, bytes) else data
        _check_base64_claim(text, 0, limits)
        packed = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
        decoded = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"malformed base64 media ({shorten(data)}): {error}") from error
    return load_media(decoded, limits, expected=expected)


def _check_base64_claim(text: str, start: int, limits: MediaLimits) -> None:
    """Compute the decoded length from the encoded one, without a copy; white space and padding carry nothing."""
    idle = sum(text.count(character, start) for character in "= \t\r\n")
    _check_claim((len(text) - start - idle) * 3 // 4, limits)


def _check_claim(num_bytes: int, limits: MediaLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise MediaError(f"media URL claims about {num_bytes} bytes, more than the allowed {limits.max_bytes} bytes")
