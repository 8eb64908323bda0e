"""Registry of the modalities that requests may contain besides text.

A new modality is one entry here, its module in `processors/media`, and a tower.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from mmlora.processors.media import audio, image
from mmlora.processors.media.items import MediaItem, MediaLimits

ContentForm = Literal["url", "base64", "object"]

_ANY_MEDIA: Final = ("url", "path", "base64")  # fields of transformers' parts


@dataclass(frozen=True)
class Modality:
    """One kind of media.

    Attributes:
        name: in requests, options, usage and metrics.
        formats: names of the file formats, for errors.
        recognizes: returns whether a file is of this modality by its first bytes; names and MIME types are ignored.
        accepts: returns whether an object (not bytes) is content of this modality.
        decode: decodes encoded bytes within limits.
        receive: receives a decoded item from another process, see `MediaItem.receive`.
        convert: converts an object for which `accepts` is true, within limits.
        part_types: types of content parts in chat messages, each with the fields that may have its content.
        processor_part: the attribute of a `transformers` processor that prepares its items.
        config_name: the attribute of a model's configuration that holds the tower's.
        features_method: the method of a `transformers` model that encodes its items.
        tower: the part of a model, as LoRA reports name it.
        blank: returns an object of small, blank content, which is processed and encoded when a model is loaded.
    """

    name: str
    formats: tuple[str, ...]
    recognizes: Callable[[bytes], bool]
    accepts: Callable[[object], bool]
    decode: Callable[[bytes, MediaLimits], MediaItem]
    receive: Callable[[Mapping[str, Any], Callable[[int], bytearray], MediaLimits], MediaItem]
    convert: Callable[[Any, MediaLimits], MediaItem]
    part_types: Mapping[str, tuple[str, ...]]
    processor_part: str
    config_name: str
    features_method: str
    tower: str
    blank: Callable[[], object]


AUDIO: Final = Modality(
    name="audio",
    formats=("WAV", "FLAC", "Ogg", "MP3", "AAC", "MP4 (M4A)", "WebM (Matroska)"),
    recognizes=audio.is_audio_file,
    accepts=audio.is_audio_pair,
    decode=audio.decode_audio,
    receive=audio.AudioItem.receive,
    convert=audio.audio_from_pair,
    part_types={
        "audio": ("audio", "audio_url", *_ANY_MEDIA),
        "audio_url": ("audio_url",),
        "input_audio": ("input_audio",),
    },
    processor_part="feature_extractor",
    config_name="audio_config",
    features_method="get_audio_features",
    tower="audio_tower",
    blank=lambda: (np.zeros(16000, np.float32), 16000),
)
IMAGE: Final = Modality(
    name="image",
    formats=("PNG", "JPEG", "WebP", "GIF", "BMP"),
    recognizes=image.is_image_file,
    accepts=image.is_image_object,
    decode=image.decode_image,
    receive=image.ImageItem.receive,
    convert=image.image_from_object,
    part_types={
        "image": ("image", "image_url", *_ANY_MEDIA),
        "image_url": ("image_url",),
        "input_image": ("image_url",),
        "image_pil": ("image_pil",),
    },
    processor_part="image_processor",
    config_name="vision_config",
    features_method="get_image_features",
    tower="vision_tower",
    blank=lambda: np.zeros((48, 64, 3), np.uint8),
)
MODALITIES: Final[Mapping[str, Modality]] = {modality.name: modality for modality in (AUDIO, IMAGE)}
# By the type of a content part.
PART_MODALITIES: Final[Mapping[str, Modality]] = {
    part_type: modality for modality in MODALITIES.values() for part_type in modality.part_types
}
