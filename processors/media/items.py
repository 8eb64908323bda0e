"""Decoded media items and the limits they were admitted under; decoding itself is in `audio.py` and `image.py`."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmlora.errors import ConfigError

Modality = Literal["audio", "image"]


@dataclass(frozen=True, eq=False)
class AudioItem:
    """Hold one mono clip.

    Attributes:
        samples: `[num_samples] float32`, full scale −1…1, read-only.
        sample_rate: Hz.
        content_hash: sha256 hex of the samples and the rate.
    """

    modality: ClassVar[Literal["audio"]] = "audio"
    samples: npt.NDArray[np.float32]
    sample_rate: int
    content_hash: str

    @classmethod
    def from_samples(cls, samples: npt.NDArray[np.float32], sample_rate: int) -> "AudioItem":
        """Take ownership of checked mono samples, freeze them and hash them."""
        samples = np.ascontiguousarray(samples, dtype=np.float32)
        samples.setflags(write=False)
        digest = hashlib.sha256(f"audio:{sample_rate}:".encode())
        digest.update(samples.data)
        return cls(samples, sample_rate, digest.hexdigest())

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.sample_rate

    @property
    def num_bytes(self) -> int:
        return self.samples.nbytes


@dataclass(frozen=True, eq=False)
class ImageItem:
    """Hold one RGB picture, EXIF-oriented, with alpha laid on white.

    Attributes:
        image: mode `RGB`; treat as read-only.
        content_hash: sha256 hex of the size and the pixels.
    """

    modality: ClassVar[Literal["image"]] = "image"
    image: Image.Image
    content_hash: str

    @classmethod
    def from_rgb(cls, image: Image.Image) -> "ImageItem":
        """Take ownership of a finished RGB image and hash it."""
        digest = hashlib.sha256(f"image:{image.width}x{image.height}:".encode())
        for box in strips(*image.size):
            digest.update(image.crop(box).tobytes())
        return cls(image, digest.hexdigest())

    @property
    def num_bytes(self) -> int:
        return 3 * self.image.width * self.image.height


def strips(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows, about a million pixels each, that make up a picture."""
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


MediaItem = AudioItem | ImageItem


@dataclass(frozen=True)
class MediaLimits:
    """Bound what media may cost; all but the last are checked before an item is decoded.

    Attributes:
        max_bytes: encoded size of an item in bytes.
        max_pixels: width x height in px.
        max_duration_s: length of a clip in seconds.
        max_samples: length of a clip in samples, whatever their rate.
        max_decoded_bytes: all media of one conversation, decoded.
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_duration_s: float = 600.0
    max_samples: int = 32_000_000
    max_decoded_bytes: int = 512 * 1024 * 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(f"MediaLimits.{field.name} is {getattr(self, field.name)!r}: it must be positive")


DEFAULT_LIMITS = MediaLimits()
DEFAULT_FETCH_TIMEOUT_S = 10.0
DEFAULT_CACHE_BYTES = 256 * 2**20
