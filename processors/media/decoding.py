"""Decode media content of any accepted form within limits; its modality follows from the content alone."""

from collections.abc import Collection, Mapping
from typing import Final

from mmlora.errors import MediaError
from mmlora.processors.media.containers import container_format, describe_content
from mmlora.processors.media.items import DEFAULT_LIMITS, MediaItem, MediaLimits, is_array
from mmlora.processors.modalities import MODALITIES, Modality

_SUPPORTED: Final = "supported are " + " and ".join(
    f"{', '.join(modality.formats.values())} {modality.name}" for modality in MODALITIES.values()
)
_FORMS: Final = "bytes, a PIL image, a [height, width, 3] uint8 array, or audio as (array, sample_rate)"
_UNSUPPORTED: Final[Mapping[str, str]] = {
    "embeds": "precomputed embeddings are not supported: send the image or the audio itself",
    "video": "videos are not supported: send their frames as images",
}


def why_unsupported(name: str) -> str | None:
    """Return a hint on a kind of content that other engines take (`image_embeds`, `video_url`); None for any other."""
    return next((reason for part, reason in _UNSUPPORTED.items() if part in name), None)


def sniff_modality(data: bytes) -> Modality | None:
    """Return the modality of encoded content by its magic bytes, or None if its format is not supported."""
    name = container_format(data)
    return next((modality for modality in MODALITIES.values() if name in modality.formats), None)


def load_media(content: object, limits: MediaLimits = DEFAULT_LIMITS, *, expected: str | None = None) -> MediaItem:
    """Decode one audio clip or image of any accepted form.

    Args:
        content: encoded bytes, `(array, sample_rate)`, a PIL image, or a `[height, width, 3] uint8` array. Paths and
            URLs are not content and are refused.
        limits: byte, pixel and duration limits; what an item claims is checked before it is decoded.
        expected: the modality that the content must have, None for any.

    Raises:
        MediaError: unusable content, or content of another modality than `expected`.
    """
    modality = _modality_of(content)
    if expected is not None and modality.name != expected:
        raise MediaError(f"the content is {modality.name}, but {expected} was expected here")
    if isinstance(content, MediaItem):
        return content
    if isinstance(content, bytes | bytearray | memoryview):
        data = bytes(content)
        if len(data) > limits.max_bytes:
            raise MediaError(f"media content of {len(data)} bytes is larger than the allowed {limits.max_bytes} bytes")
        return modality.decode(data, limits)
    return modality.convert(content, limits)


def check_counts(counts: Mapping[str, int], modalities: Collection[str], limits: Mapping[str, int] | None) -> None:
    """Refuse media that a model does not take, or more of it than a prompt may hold.

    Args:
        counts: items by modality.
        modalities: what the model takes.
        limits: most items by modality (`limit_mm_per_prompt`); others are not limited.

    Raises:
        MediaError: names the modality, the number and what is allowed.
    """
    for modality, count in counts.items():
        if count and modality not in modalities:
            takes = ", ".join(sorted(modalities)) or "text only"
            raise MediaError(f"the prompt holds {modality}; the model takes {takes}")
        limit = (limits or {}).get(modality)
        if limit is not None and count > limit:
            raise MediaError(f"the prompt has {count} {modality} items; limit_mm_per_prompt allows {limit}")


def check_decoded_bytes(num_bytes: int, limits: MediaLimits) -> None:
    """Refuse the media of one prompt once they have more bytes than it may hold.

    Raises:
        MediaError: names the number and what is allowed.
    """
    if num_bytes > limits.max_decoded_bytes:
        raise MediaError(
            f"the media of the prompt have {num_bytes} bytes or more when decoded; "
            f"allowed are {limits.max_decoded_bytes}"
        )


def _modality_of(content: object) -> Modality:
    if isinstance(content, MediaItem):
        return MODALITIES[content.modality]
    if isinstance(content, bytes | bytearray | memoryview):
        return _modality_of_bytes(bytes(content[:512]))
    for modality in MODALITIES.values():
        if modality.accepts(content):
            return modality
    if is_array(content):
        raise MediaError(
            f"a bare array of shape {tuple(content.shape)} is not supported: an image is a [height, width, 3] uint8 "
            "array, audio is (array, sample_rate), and precomputed embeddings are not supported"
        )
    raise MediaError(f"media content is a {type(content).__name__}; allowed are {_FORMS}{_hint(content)}")


def _modality_of_bytes(head: bytes) -> Modality:
    if not head:
        raise MediaError(f"media content of 0 bytes; {_SUPPORTED}")
    modality = sniff_modality(head)
    if modality is None:
        raise MediaError(f"the content is neither audio nor an image but {describe_content(head)}; {_SUPPORTED}")
    return modality


def _hint(content: object) -> str:
    if isinstance(content, str):
        return "; URLs go through load_url"
    if hasattr(content, "__fspath__"):
        return "; read the file and pass its bytes"
    return ""
