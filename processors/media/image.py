"""Images: encoded bytes, PIL images or arrays to `ImageItem` (EXIF orientation, alpha on white, RGB)."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mmlora.errors import MediaError
from mmlora.processors.media.image_structure import check_image_structure
from mmlora.processors.media.items import DEFAULT_LIMITS, MediaItem, MediaLimits, is_array, to_numpy

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")
_BMP_HEADER_BYTES = frozenset({12, 40, 52, 56, 64, 108, 124})  # of the known DIB headers
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


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

    @property
    def dimensions(self) -> dict[str, int]:
        return {"width": self.image.width, "height": self.image.height}

    def chunks(self) -> Iterator[bytes]:
        return (self.image.crop(box).tobytes() for box in strips(*self.image.size))

    @classmethod
    def receive(cls, header: Mapping[str, Any], read: Callable[[int], bytearray], limits: MediaLimits) -> Self:
        width, height = int(header["width"]), int(header["height"])
        if not 0 < width * height <= limits.max_pixels or width < 1:
            raise ValueError(f"an image of {width}x{height} px is not within the limits")
        image = Image.new("RGB", (width, height))
        for box in strips(width, height):
            size = width, box[3] - box[1]
            image.paste(Image.frombytes("RGB", size, read(3 * size[0] * size[1])), box)
        return cls(str(header["content_hash"]), image)


def is_image_file(data: bytes) -> bool:
    """Return whether a file is an image of a supported format, by its first bytes."""
    if data.startswith(b"RIFF"):
        return data[8:12] == b"WEBP"
    if data.startswith(b"BM"):
        return int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES
    return data.startswith(_MAGIC)


def decode_image(data: bytes, limits: MediaLimits = DEFAULT_LIMITS) -> ImageItem:
    """Decode the first frame of PNG, JPEG, WebP, GIF or BMP bytes; the size in the header is checked first.

    Raises:
        MediaError: undecodable, truncated, more than `limits.max_pixels`, or too many parts.
    """
    _check_complete(data)
    check_image_structure(data)
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except _BOMB as error:
        raise MediaError(f"image is larger than the allowed {limits.max_pixels} px: {error}") from error
    except UnidentifiedImageError as error:  # its text has the address of our buffer
        raise MediaError(f"cannot decode the image content ({len(data)} bytes): its header is damaged") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged headers
        raise MediaError(f"cannot decode the image content ({len(data)} bytes): {error}") from error
    return image_from_pil(image, limits)


def is_image_object(content: object) -> bool:
    """Return whether an object is a PIL image or an array of three dimensions."""
    return isinstance(content, Image.Image) or (is_array(content) and content.ndim == 3)


def image_from_object(content: Any, limits: MediaLimits = DEFAULT_LIMITS) -> ImageItem:
    """Convert a PIL image, or a `[height, width, 3] uint8` array or tensor.

    Raises:
        MediaError: as `image_from_pil`, or an array of another shape or type.
    """
    if isinstance(content, Image.Image):
        return image_from_pil(content, limits)
    values = to_numpy(content)
    if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint8:
        raise MediaError(
            f"array of shape {tuple(values.shape)} and type {values.dtype}: "
            "an image array is [height, width, 3] uint8, an audio array is given as (array, sample_rate)"
        )
    if values.size == 0:
        raise MediaError(f"image array of shape {tuple(values.shape)} has no pixels")
    return image_from_pil(Image.fromarray(np.ascontiguousarray(values)), limits)


def image_from_pil(image: Image.Image, limits: MediaLimits = DEFAULT_LIMITS) -> ImageItem:
    """Load, orient and convert a PIL image to RGB; the given image is not changed.

    Raises:
        MediaError: no pixels, too many, undecodable, or a mode whose range is not defined (`F`).
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise MediaError(f"image of {width}x{height} px has no pixels")
    if width * height > limits.max_pixels:
        raise MediaError(f"image of {width}x{height} px is larger than the allowed {limits.max_pixels} px")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins, as in `decode_image`
        raise MediaError(
            f"cannot decode the {image.format or image.mode} image of {width}x{height} px: {error}"
        ) from error
    return ImageItem.from_rgb(_to_rgb(_oriented(image)))


def strips(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes of whole rows, about a million pixels each, that cover an image."""
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _check_complete(data: bytes) -> None:
    """Refuse a WebP that is shorter than its RIFF header claims, which Pillow accepts."""
    if data.startswith(b"RIFF"):
        claimed = int.from_bytes(data[4:8], "little") + 8
        if claimed > len(data):
            raise MediaError(f"truncated WebP: its header claims {claimed} bytes, {len(data)} are there")


def _oriented(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # which `exif_transpose` would copy
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block does not make an image unusable
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise MediaError("image of mode 'F' has no defined range: convert it to 8-bit 'L' or 'RGB' first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _sixteen_bit_to_rgb(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Composite an image on white, in strips, which limits the memory for intermediate results."""
    rgb = Image.new("RGB", image.size)
    for box in strips(*image.size):
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return rgb


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 0…65535 to 0…255; Pillow's own conversion clips at 255 instead."""
    values = np.asarray(image)  # [height, width]
    if values.min() < 0 or values.max() > 65535:
        raise MediaError(
            f"image of mode {image.mode!r} holds values {values.min()} to {values.max()}: 0 to 65535 are allowed"
        )
    gray = np.empty(values.shape, np.uint8)
    for _, top, _, bottom in strips(*image.size):
        gray[top:bottom] = (values[top:bottom].astype(np.int64) + 128) // 257
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")
