"""`MediaItem`, the base class of decoded media, and `MediaLimits`; `audio.py` and `image.py` have the items."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, TypeGuard

import numpy as np
import numpy.typing as npt

from mmlora.errors import ConfigError


@dataclass(frozen=True, eq=False)
class MediaItem(ABC):
    """One decoded item.

    Attributes:
        modality: name of the modality in `MODALITIES`.
        content_hash: sha256 hex; items of equal content have equal hashes.
    """

    modality: ClassVar[str]
    content_hash: str

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of the decoded content."""

    @property
    @abstractmethod
    def dimensions(self) -> dict[str, int]:
        """What describes the content in `chunks`, for `receive`."""

    @abstractmethod
    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the decoded content as bytes, to send it to another process."""

    @classmethod
    @abstractmethod
    def receive(cls, header: Mapping[str, Any], read: Callable[[int], bytearray], limits: "MediaLimits") -> Self:
        """Return the item that another process has sent.

        Args:
            header: `content_hash` and `dimensions` of the item.
            read: returns the next bytes of its `chunks`.
            limits: within which the item must be.

        Raises:
            ValueError: it is not within the limits.
        """


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
    """Limits on media. Declared sizes are checked before decoding, all but `max_decoded_bytes` again while decoding.

    Attributes:
        max_bytes: encoded size of an item in bytes.
        max_pixels: width x height in px.
        max_duration_s: length of a clip in seconds.
        max_samples: length of a clip in samples at its own rate.
        max_decoded_bytes: size of all media of one prompt in bytes, decoded and as features.
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_duration_s: float = 600.0
    max_samples: int = 32_000_000
    max_decoded_bytes: int = 1024 * 1024 * 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(f"MediaLimits.{field.name} is {getattr(self, field.name)!r}: it must be positive")


DEFAULT_LIMITS = MediaLimits()
DEFAULT_FETCH_TIMEOUT_S = 10.0
DEFAULT_DECODE_TIMEOUT_S = 20.0
DEFAULT_CACHE_BYTES = 256 * 2**20
