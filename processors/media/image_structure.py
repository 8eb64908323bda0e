"""Checks of image files before decoding: parts that Pillow and its libraries would read one by one, however many.

Pixels are limited in `image.py`. Of animations only the first frame is decoded, so that the number of
frames needs no limit.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from mmlora.errors import MediaError

MAX_JPEG_SCANS: Final = 100  # a progressive JPEG has about 10; each one is a pass over all pixels
MAX_JPEG_SEGMENTS: Final = 4096
MAX_EXIF_SEGMENTS: Final = 16  # of at most 64 KiB; Pillow joins them in quadratic time
MAX_PNG_CHUNKS: Final = 1 << 17
MAX_GIF_BLOCKS: Final = 1 << 17  # of extensions before the first frame
MAX_RLE_BMP_BYTES: Final = 4 << 20  # decoded in Python, pixel by pixel

# Neither stuffing and restart markers, which belong to the data of a scan, nor fill bytes.
_JPEG_MARKER: Final = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
_START_OF_IMAGE, _END_OF_IMAGE, _SCAN, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
_BMP_RLE: Final = (1, 2)  # BI_RLE8 and BI_RLE4


def check_image_structure(data: bytes) -> None:
    """Refuse a file with too many parts.

    Raises:
        MediaError: names the number and the limit.
    """
    for magic, check in _CHECKS.items():
        if data.startswith(magic):
            check(data)


def _check_jpeg(data: bytes) -> None:
    num_scans = num_exif = 0
    for count, (marker, start) in enumerate(_jpeg_segments(data), start=1):
        num_scans += marker == _SCAN
        num_exif += marker == _APP1 and data.startswith(b"Exif", start)
        _check_count(num_scans, MAX_JPEG_SCANS, "JPEG", "scans")
        _check_count(num_exif, MAX_EXIF_SEGMENTS, "JPEG", "Exif segments")
        _check_count(count, MAX_JPEG_SEGMENTS, "JPEG", "segments")
        if marker == _END_OF_IMAGE and num_scans:  # before the first scan, Pillow reads on
            return


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each segment and the start of its content."""
    position = 0
    while (match := _JPEG_MARKER.search(data, position)) is not None:
        marker, position = data[match.end() - 1], match.end()
        yield marker, position + 2
        if marker not in (_START_OF_IMAGE, _END_OF_IMAGE):
            position += max(int.from_bytes(data[position : position + 2], "big"), 2)


def _check_png(data: bytes) -> None:
    position, count = 8, 0
    while position < len(data):
        count += 1
        _check_count(count, MAX_PNG_CHUNKS, "PNG", "chunks")
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _check_gif(data: bytes) -> None:
    """Count the blocks of extensions up to the first frame."""
    position, count = 13, 0
    if data[10:11] and data[10] & 0x80:
        position += 6 << (data[10] & 7)  # the palette
    while position + 2 < len(data) and data[position] != ord(","):
        is_extension = data[position] == ord("!")
        position += 2 if is_extension else 1
        while is_extension and position < len(data):
            count += 1
            _check_count(count, MAX_GIF_BLOCKS, "GIF", "blocks before its first frame")
            length = data[position]
            position += 1 + length
            is_extension = length > 0


def _check_bmp(data: bytes) -> None:
    if len(data) > MAX_RLE_BMP_BYTES and int.from_bytes(data[30:34], "little") in _BMP_RLE:
        raise MediaError(
            f"the BMP has {len(data)} bytes with run-length encoding; at most {MAX_RLE_BMP_BYTES} are allowed"
        )


def _check_count(count: int, limit: int, name: str, parts: str) -> None:
    if count > limit:
        raise MediaError(f"the {name} has more than the allowed {limit} {parts}")


_CHECKS: Final[Mapping[bytes, Callable[[bytes], None]]] = {
    b"\xff\xd8\xff": _check_jpeg,
    b"\x89PNG": _check_png,
    b"GIF8": _check_gif,
    b"BM": _check_bmp,
}
