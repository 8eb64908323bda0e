"""Images of many parts are refused before decoding; ordinary ones, and those at the limit, are decoded."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from mmlora.errors import MediaError
from mmlora.processors.media import image_structure as limits
from mmlora.processors.media.loader import load_media

SCAN, END = b"\xff\xda", b"\xff\xd9"


def jpeg(**options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(file, "JPEG", **options)
    return file.getvalue()


def with_segments(*segments):
    """Put segments of a marker and a content into a JPEG, in front of the others."""
    parts = [marker + struct.pack(">H", len(content) + 2) + content for marker, content in segments]
    return jpeg()[:2] + b"".join(parts) + jpeg()[2:]


def with_scans(count):
    """Repeat the last scan of a progressive JPEG until it has `count`."""
    data = jpeg(progressive=True)
    last = data[data.rindex(SCAN) : -2]
    return data[:-2] + last * (count - data.count(SCAN)) + END


def chunk(kind, content=b""):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(num_extra, where):
    """Return a PNG with as many further chunks in front of its pixels, among them, or after them."""
    packed, extra = zlib.compress(bytes(13) * 4), chunk(b"IDAT" if where == "among" else b"teSt") * num_extra
    pixels, end = chunk(b"IDAT", packed), chunk(b"IEND")
    content = pixels + extra + end if where == "after" else extra + pixels + end
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)) + content


def gif(extensions):
    file = io.BytesIO()
    Image.new("P", (4, 4)).save(file, "GIF")
    data = file.getvalue()
    at = data.index(b",", 13)
    return data[:at] + extensions + data[at:]


def bmp(num_bytes):
    head = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 1078, 40, 900, 900, 1, 8, 1, 0, 1, 1, 256, 0)
    return (head + bytes(1024)).ljust(num_bytes, b"\1")


@pytest.mark.parametrize(
    ("build", "limit", "named"),
    [
        (with_scans, limits.MAX_JPEG_SCANS, "scans"),
        (lambda n: with_segments(*[(b"\xff\xe1", b"Exif\0\0x")] * n), limits.MAX_EXIF_SEGMENTS, "Exif segments"),
        (lambda n: with_segments(*[(b"\xff\xfe", b"")] * (n - jpeg_size())), limits.MAX_JPEG_SEGMENTS, "segments"),
        (lambda n: with_segments(*[(b"\xff\xe2", b"x" * 9)] * (n - jpeg_size())), limits.MAX_JPEG_SEGMENTS, "segments"),
        (lambda n: png(n - 3, "before"), limits.MAX_PNG_CHUNKS, "chunks"),
        (lambda n: png(n - 3, "among"), limits.MAX_PNG_CHUNKS, "chunks"),
        (lambda n: png(n - 3, "after"), limits.MAX_PNG_CHUNKS, "chunks"),
        (lambda n: gif(b"!\xfe\1a\0" * (n // 2) + b"!\xfe\0" * (n % 2)), limits.MAX_GIF_BLOCKS, "blocks before"),
        (lambda n: gif(b"!\xff" + b"\1a" * (n - 1) + b"\0"), limits.MAX_GIF_BLOCKS, "blocks before"),
    ],
    ids=["scans", "exif", "comments", "profiles", "png before", "png among", "png after", "gif comments", "gif blocks"],
)
def test_parts_are_counted(build, limit, named):
    assert load_media(build(limit)).image.width > 0
    start_s = time.monotonic()
    with pytest.raises(MediaError, match=f"more than the allowed {limit} {named}"):
        load_media(build(limit + 1))
    with pytest.raises(MediaError, match=f"more than the allowed {limit} {named}"):
        load_media(build(10 * limit))
    assert time.monotonic() - start_s < 20


def jpeg_size():
    return sum(1 for _ in limits._jpeg_segments(jpeg()))


def test_run_length_encoding_is_limited():
    with pytest.raises(MediaError, match="4194305 bytes with run-length encoding; at most 4194304 are allowed"):
        load_media(bmp(limits.MAX_RLE_BMP_BYTES + 1))


def test_an_early_end_marker_hides_no_segments():
    data = jpeg()[:2] + END + with_segments(*[(b"\xff\xfe", b"")] * limits.MAX_JPEG_SEGMENTS)[2:]
    with pytest.raises(MediaError, match="segments"):
        load_media(data)


def test_what_follows_a_jpeg_is_not_counted():
    """Phones append films and further pictures."""
    noise = np.random.default_rng(0).bytes(2_000_000) + (b"\xff\xfe\0\2") * limits.MAX_JPEG_SEGMENTS
    assert load_media(jpeg() + noise).content_hash == load_media(jpeg()).content_hash


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"optimize": True}])
def test_ordinary_jpegs_have_few_segments(options):
    data = jpeg(**options)
    assert sum(1 for _ in limits._jpeg_segments(data)) < 30
    assert load_media(data).image.size == (64, 64)


def test_a_large_scan_is_searched_quickly():
    start_s = time.monotonic()
    data = jpeg()[:-2] + b"\xff\x00" * 10_000_000 + END
    limits.check_image_structure(data)
    assert time.monotonic() - start_s < 10
