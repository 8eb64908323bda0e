"""The way into the processors: decide what a piece of content is, by what it is, and decode it within limits."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmlora.errors import MediaError
from mmlora.processors.media.audio import audio_from_array, decode_audio
from mmlora.processors.media.image import decode_image, image_from_array, image_from_pil
from mmlora.processors.media.items import DEFAULT_LIMITS, AudioItem, ImageItem, MediaItem, MediaLimits, Modality
from mmlora.processors.media.sniff import describe, sniff

__all__ = [
    "AudioItem",
    "ImageItem",
    "MediaItem",
    "MediaLimits",
    "Modality",
    "check_counts",
    "check_decoded_bytes",
    "load_media",
    "sniff",
]

_SUPPORTED = "supported are WAV, FLAC, OGG and MP3 audio and PNG, JPEG, WebP, GIF and BMP images"
_FORMS = "bytes, a PIL image, a [height, width, 3] uint8 array, or audio as (array, sample_rate)"

NOT_TAKEN: Mapping[str, str] = {
    "embeds": "ready embeddings are not taken: give the image or the audio itself",
    "video": "videos are not taken: give their frames as images",
}


def why_not_taken(name: str) -> str | None:
    """Return a sentence on a kind of content that others take (`image_embeds`, `video_url`); None for any other."""
    return next((reason for part, reason in NOT_TAKEN.items() if part in name), None)


def load_media(content: object, limits: MediaLimits = DEFAULT_LIMITS, *, expected: str | None = None) -> MediaItem:
    """Decode one audio clip or image of any accepted form.

    Args:
        content: encoded bytes (told by magic bytes), `(array, sample_rate)`, a PIL image, or a
            `[height, width, 3] uint8` array. Paths and URLs are not content and are refused.
        limits: byte, pixel and duration limits, checked before decoding.
        expected: `"audio"` or `"image"` where the caller's field says which it must be.

    Raises:
        MediaError: unusable content, or content of the other modality than `expected`.
    """
    modality = _modality_of(content)
    if expected is not None and modality != expected:
        raise MediaError(f"the content is {modality}, but {expected} was expected here")
    if isinstance(content, AudioItem | ImageItem):
        return content
    if isinstance(content, bytes | bytearray | memoryview):
        data = bytes(content)
        _check_bytes(len(data), limits)
        return decode_audio(data, limits) if modality == "audio" else decode_image(data, limits)
    if isinstance(content, Image.Image):
        return image_from_pil(content, limits)
    if isinstance(content, tuple | list):
        return audio_from_array(content[0], content[1], limits)
    return image_from_array(content, limits)


def check_counts(counts: Mapping[str, int], modalities: Collection[str], limits: Mapping[str, int] | None) -> None:
    """Refuse media that a model does not take, or more of it than a prompt may hold.

    Args:
        counts: items by modality.
        modalities: what the model takes.
        limits: most items by modality (`limit_mm_per_prompt`); others are not limited.

    Raises:
        MediaError: naming the modality, the number and what is allowed.
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
        MediaError: naming the number and what is allowed.
    """
    if num_bytes > limits.max_decoded_bytes:
        raise MediaError(
            f"the media of the prompt have {num_bytes} bytes or more when decoded; "
            f"allowed are {limits.max_decoded_bytes}"
        )


def _modality_of(content: object) -> Modality:
    if isinstance(content, AudioItem | ImageItem):
        return content.modality
    if isinstance(content, bytes | bytearray | memoryview):
        return _modality_of_bytes(content)
    if isinstance(content, Image.Image):
        return "image"
    if isinstance(content, np.ndarray | torch.Tensor):
        if content.ndim == 3:
            return "image"
        raise MediaError(
            f"a bare array of shape {tuple(content.shape)} is no media: an image is a [height, width, 3] uint8 array, "
            "audio is (array, sample_rate), and ready embeddings are not taken"
        )
    if isinstance(content, tuple | list):
        _check_pair(content)
        return "audio"
    raise MediaError(f"media content is a {type(content).__name__}; allowed are {_FORMS}{_hint(content)}")


def _modality_of_bytes(content: bytes | bytearray | memoryview) -> Modality:
    head = bytes(content[:512])
    if not head:
        raise MediaError(f"media content of 0 bytes; {_SUPPORTED}")
    modality = sniff(head)
    if modality is None:
        raise MediaError(f"the content is neither audio nor an image but {describe(head)}; {_SUPPORTED}")
    return modality


def _check_pair(content: tuple[Any, ...] | list[Any]) -> None:
    if len(content) != 2:
        raise MediaError(
            f"a {type(content).__name__} of {len(content)} items is not media; audio is (array, sample_rate)"
        )
    if isinstance(content[0], int | float) and isinstance(content[1], np.ndarray | torch.Tensor):
        raise MediaError("got (sample_rate, array); audio is given as (array, sample_rate)")


def _check_bytes(num_bytes: int, limits: MediaLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise MediaError(f"media content of {num_bytes} bytes is larger than the allowed {limits.max_bytes} bytes")


def _hint(content: object) -> str:
    if isinstance(content, str):
        return "; URLs go through load_url"
    if hasattr(content, "__fspath__"):
        return "; read the file and pass its bytes"
    return ""
