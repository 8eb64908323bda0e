"""Checks of audio containers before decoding: truncation, and tables that claim far more entries than they have.

libsndfile and FFmpeg decode a truncated file as a shorter one without an error. FLAC and MP3 are checked after
decoding, against the number of samples or frames in their header; WAV often declares a wrong length, raw AAC none.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from mmlora.errors import MediaError

MAX_MP4_SAMPLES: Final = 4_000_000  # packets of all tracks; FFmpeg's index has 24 bytes for each
MAX_MP4_TAGS: Final = 1_000  # FFmpeg compares each tag with all others
MAX_METADATA_BYTES: Final = 1 << 18  # of a Matroska file, which may consist of tags
MAX_EBML_ELEMENTS: Final = 1_000_000
MAX_MP4_BOXES: Final = 1 << 17  # at the top level; a fragment has two
MAX_OGG_PAGES: Final = 1 << 18
MAX_ID3_TAGS: Final = 64  # in front of the audio
MAX_INNER_ID3_BYTES: Final = 1 << 16  # of an ID3 tag within raw AAC, which may contain many frames

_OGG_HEADER_BYTES = 27
_OGG_BEGIN = 2  # flag of the first page of a stream
_MAX_OGG_PAGE_SAMPLES = 255 * 5760  # packets of at most 120 ms at 48 kHz
# Lookaheads, so that matches may overlap and none can hide another.
_MP4_COUNT = re.compile(rb"(?=stsz.{8}(.{4})|stz2.{8}(.{4})|trun.{4}(.{4}))", re.DOTALL)
_ALAC_FRAME = re.compile(rb"(?=alac\0{4}(.{4}))", re.DOTALL)
_INNER_ID3 = re.compile(rb"(?=ID3[\2-\4]\0.([\0-\x7f]{4}))", re.DOTALL)
_MAX_ALAC_FRAME = 1 << 16  # samples; encoders write 4096
_SEGMENT, _CLUSTER, _VOID = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\xec"
_MATROSKA_CONTENT = frozenset((_SEGMENT, _CLUSTER, _VOID, b"\xa3", b"\xa0"))  # and SimpleBlock, BlockGroup
_XING = re.compile(rb"(?:Xing|Info).{3}(.)(.{4})|VBRI.{10}(.{4})", re.DOTALL)
_XING_WINDOW = 64  # bytes from the start of a frame; the tag begins at 36 at the latest


def skip_id3(data: bytes) -> bytes:
    """Return audio without the ID3v2 tags in front of it, which may contain images and thousands of frames."""
    position = count = 0
    while data[position : position + 3] == b"ID3" and len(data) >= position + 10:
        count += 1
        if count > MAX_ID3_TAGS:
            raise MediaError(f"the audio has more than the allowed {MAX_ID3_TAGS} ID3 tags")
        has_footer = data[position + 5] & 0x10
        position += 10 + _synchsafe(data[position + 6 : position + 10]) + (10 if has_footer else 0)
    return data[position:]


def claimed_mp3_frames(data: bytes) -> int | None:
    """Return the number of frames in the Xing, Info or VBRI tag of an MP3 stream, None without such a tag."""
    start = max(data.find(b"\xff"), 0)
    tag = _XING.search(data, start, start + _XING_WINDOW)
    if tag is None:
        return None
    flags, xing, vbri = tag.groups()
    if flags is not None and not flags[0] & 1:
        return None
    return int.from_bytes(xing or vbri, "big")


def _synchsafe(four: bytes) -> int:
    """Return the size of an ID3 tag; each byte has seven bits."""
    return sum(byte << shift for byte, shift in zip(four, (21, 14, 7, 0), strict=True))


def is_chained_ogg(data: bytes) -> bool:
    """Return whether further streams begin after the end of the first ones, as in recordings of web radio."""
    begins = [bool(data[at + 5] & _OGG_BEGIN) for at, _ in _ogg_pages(data)]
    return False in begins and any(begins[begins.index(False) :])


def _check_ogg(data: bytes) -> None:
    for count, (position, end) in enumerate(_ogg_pages(data), start=1):
        if count > MAX_OGG_PAGES:
            raise MediaError(f"the Ogg file has more than the allowed {MAX_OGG_PAGES} pages")
        if end > len(data) and not _is_joined_midway(data):
            raise MediaError(f"truncated OGG: the page at byte {position} is longer than the {len(data)} bytes given")


def _is_joined_midway(data: bytes) -> bool:
    """Return whether an Ogg file is a recording of a running stream, which ends anywhere.

    The first page with a granule position, of the last sample in it, is then far behind the start of the stream.
    """
    positions = (int.from_bytes(data[at + 6 : at + 14], "little", signed=True) for at, _ in _ogg_pages(data))
    return next((position for position in positions if position > 0), 0) > _MAX_OGG_PAGE_SAMPLES


def _ogg_pages(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each page; the last one may end after the data."""
    position = data.find(b"OggS")
    while position >= 0:
        segments_at = position + _OGG_HEADER_BYTES
        num_segments = data[segments_at - 1] if segments_at <= len(data) else 1
        lengths = data[segments_at : segments_at + num_segments]
        end = segments_at + num_segments + sum(lengths)
        yield position, end if len(lengths) == num_segments else max(end, len(data) + 1)
        position = data.find(b"OggS", end)  # padding between pages is skipped


def _check_mp4(data: bytes) -> None:
    """Check the top-level boxes. Tables of constant-size samples have no entries, so they can claim billions."""
    num_samples = num_boxes = position = 0
    while position + 8 <= len(data):
        num_boxes += 1
        if num_boxes > MAX_MP4_BOXES:
            raise MediaError(f"the MP4 has more than the allowed {MAX_MP4_BOXES} boxes")
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        size = size or len(data) - position  # 0: up to the end
        if size < 8 or size > len(data) - position:
            raise MediaError(
                f"truncated or damaged MP4: its {kind!r} box claims {size} bytes, {len(data) - position} are there"
            )
        if kind != b"mdat":  # FFmpeg looks for tables in padding, too
            box = data[position : position + size]
            for match in _MP4_COUNT.finditer(box):
                num_samples += int.from_bytes(match[match.lastindex or 1], "big")
            if num_samples > MAX_MP4_SAMPLES:
                raise MediaError(f"the MP4 claims {num_samples} packets; at most {MAX_MP4_SAMPLES} are allowed")
            if box.count(b"data") > MAX_MP4_TAGS:
                raise MediaError(f"the MP4 has more than the allowed {MAX_MP4_TAGS} tags")
            if b"cmov" in box:
                raise MediaError("the MP4 has a compressed header (cmov), which is not supported")
            for length in _ALAC_FRAME.findall(box):
                if int.from_bytes(length, "big") > _MAX_ALAC_FRAME:
                    raise MediaError(f"the MP4 claims ALAC frames of more than the allowed {_MAX_ALAC_FRAME} samples")
        position += size


def _check_adts(data: bytes) -> None:
    largest = max(map(_synchsafe, _INNER_ID3.findall(data)), default=0)
    if largest > MAX_INNER_ID3_BYTES:
        raise MediaError(
            f"the AAC stream contains an ID3 tag of {largest} bytes; at most {MAX_INNER_ID3_BYTES} are allowed"
        )


def _check_matroska(data: bytes) -> None:
    """Check the elements of the segment for truncation and excessive metadata."""
    metadata_bytes = 0
    for count, (position, element_id, start, end) in enumerate(_ebml_elements(data)):
        if end is not None and end > len(data):
            raise MediaError(
                f"truncated WebM or Matroska: the element at byte {position} claims {end - start} bytes, "
                f"{len(data) - start} are there"
            )
        if element_id not in _MATROSKA_CONTENT:
            metadata_bytes += (end or start) - position
        if metadata_bytes > MAX_METADATA_BYTES or count == MAX_EBML_ELEMENTS:
            raise MediaError(
                f"the WebM or Matroska file has more than the allowed {MAX_METADATA_BYTES} bytes of metadata or "
                f"{MAX_EBML_ELEMENTS} elements"
            )


def _ebml_elements(data: bytes) -> Iterator[tuple[int, bytes, int, int | None]]:
    """Yield the position, id, and start and end of the content of top-level elements and those in the segment.

    Live recordings have segments and clusters of unknown size: their end is None, and their children follow.
    """
    position = 0
    while position + 1 < len(data) and data[position]:
        size_at = position + 9 - data[position].bit_length()
        if size_at >= len(data) or not data[size_at]:
            return
        start = size_at + 9 - data[size_at].bit_length()
        unknown = (1 << 7 * (start - size_at)) - 1
        size = int.from_bytes(data[size_at:start], "big") & unknown
        element_id, end = data[position:size_at], None if size == unknown else start + size
        yield position, element_id, start, end
        position = start if end is None or element_id == _SEGMENT else end


# By `audio_format`. Each check raises a `MediaError` that names the claimed size and the present or allowed one.
CONTAINER_CHECKS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "ogg": _check_ogg,
    "mp4": _check_mp4,
    "matroska": _check_matroska,
    "aac": _check_adts,
}
