"""Decoded media items and their limits; `audio.py` and `image.py` decode them."""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmlora.errors import ConfigError


@dataclass(frozen=True, eq=False)
class MediaItem(ABC):
    """One decoded item.

    Attributes:
        modality: its name in `MODALITIES`.
        content_hash: sha256 hex; items of equal content have equal hashes.
    """

    modality: ClassVar[str]
    content_hash: str

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of the decoded content."""


@dataclass(frozen=True, eq=False)
class AudioItem(MediaItem):
    """A mono clip.

    Attributes:
        content_hash: of the samples and the rate.
        samples: `[num_samples] float32`, full scale −1…1, read-only.
        sample_rate: Hz.
    """

    modality: ClassVar[str] = "audio"
    samples: npt.NDArray[np.float32]
    sample_rate: int

    @classmethod
    def from_samples(cls, samples: npt.NDArray[np.float32], sample_rate: int) -> "AudioItem":
        """Take ownership of checked mono samples, freeze them and hash them."""
        samples = np.ascontiguousarray(samples, dtype=np.float32)
        samples.setflags(write=False)
        digest = hashlib.sha256(f"audio:{sample_rate}:".encode())
        digest.update(samples.data)
        return cls(digest.hexdigest(), samples, sample_rate)

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.sample_rate

    @property
    def num_bytes(self) -> int:
        return self.samples.nbytes


@dataclass(frozen=True, eq=False)
class ImageItem(MediaItem):
    """An RGB image, EXIF-oriented, composited on white where it is transparent.

    Attributes:
        content_hash: of the size and the pixels.
        image: mode `RGB`; treat as read-only.
    """

    modality: ClassVar[str] = "image"
    image: Image.Image

    @classmethod
    def from_rgb(cls, image: Image.Image) -> "ImageItem":
        """Take ownership of a finished RGB image and hash it."""
        digest = hashlib.sha256(f"image:{image.width}x{image.height}:".encode())
        for box in strips(*image.size):
            digest.update(image.crop(box).tobytes())
        return cls(digest.hexdigest(), image)

    @property
    def num_bytes(self) -> int:
        return 3 * self.image.width * self.image.height


def strips(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes of whole rows, about a million pixels each, that cover an image."""
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def is_array(content: object) -> TypeGuard[Any]:
    """Return whether an object is a numpy array or a torch tensor; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return isinstance(content, np.ndarray) or (torch is not None and isinstance(content, torch.Tensor))


def to_numpy(array: Any) -> npt.NDArray[Any]:
    """Return a numpy array or a torch tensor as a numpy array; bfloat16 becomes float32."""
    if isinstance(array, np.ndarray):
        return array
    tensor = array.detach().cpu()
    result: npt.NDArray[Any] = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    return result


@dataclass(frozen=True)
class MediaLimits:
    """Limits on media; what an item claims is checked before decoding, all but the last again while decoding.

    Attributes:
        max_bytes: encoded size of an item in bytes.
        max_pixels: width x height in px.
        max_duration_s: length of a clip in seconds.
        max_samples: length of a clip in samples at its own rate.
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
