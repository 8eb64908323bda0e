"""WAV, RF64, BW64 and Wave64 files: finds the audio in them, whatever sizes their headers claim.

Recorders and text-to-speech servers often write the header before they know the length and never correct it. Like
libsndfile, FFmpeg and browsers, `read_wav` takes the samples that are there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from mmlora.errors import MediaError

EXTENSIBLE: Final = 0xFFFE  # the format tag is the start of a GUID at the end of the format
MPEG_LAYER_3: Final = 0x55

MAX_CHUNKS: Final = 10_000  # encoders write a few; empty ones take 8 bytes

_MIN_FORMAT_BYTES: Final = 16
_LARGE_FILE_IDS: Final = (b"RF64", b"BW64")  # the size of their data is in the chunk ds64
_LARGE_SIZE: Final = 0xFFFFFFFF
# In Wave64 a chunk's name is a GUID: these four characters and this end, but for the one in front.
_WAVE64_GUID: Final = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_WAVE64_START: Final = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")


@dataclass(frozen=True)
class Wav:
    """The audio of a WAV file.

    Attributes:
        header: content of the `fmt ` chunk.
        samples: content of the `data` chunk that is there, encoded as the header says.
    """

    header: bytes
    samples: bytes

    @property
    def format_tag(self) -> int:
        """The encoding of the samples, such as 1 for integers and 3 for floats."""
        tag = int.from_bytes(self.header[:2], "little")
        return int.from_bytes(self.header[24:26], "little") if tag == EXTENSIBLE else tag

    def to_bytes(self) -> bytes:
        """Return a WAV file with right sizes and no other chunks."""
        chunks = b"WAVE" + _chunk(b"fmt ", self.header) + _chunk(b"data", self.samples)
        return _chunk(b"RIFF", chunks)


def is_wav(head: bytes) -> bool:
    """Return whether a file is a WAV, RF64, BW64 or Wave64 file, by its first 40 bytes."""
    if head[:4] in (b"RIFF", *_LARGE_FILE_IDS):
        return head[8:12] == b"WAVE"
    return head.startswith(_WAVE64_START) and head[24:40] == b"wave" + _WAVE64_GUID


def read_wav(data: bytes) -> Wav:
    """Find the format and the samples of a WAV file.

    The samples reach to the end of the file if the size of their chunk is too large, or 0 although samples follow.

    Raises:
        MediaError: a chunk before the samples is truncated, there is no format or no data chunk, or too many chunks.
    """
    header: bytes | None = None
    large_size = 0
    for name, start, size in _chunks(data):
        if name == b"data":
            if header is None:
                raise MediaError("the WAV has no 'fmt ' chunk in front of its samples")
            size = large_size if size == _LARGE_SIZE and data[:4] in _LARGE_FILE_IDS else size
            if size == 0 and not _is_chunks(data, start):
                size = len(data)
            return Wav(header, data[start : start + size])
        if start + size > len(data):
            shown, present = name.decode("latin-1"), max(len(data) - start, 0)
            raise MediaError(f"truncated WAV: its {shown!r} chunk claims {size} bytes, {present} are there")
        if name == b"ds64":
            large_size = int.from_bytes(data[start + 8 : start + 16], "little")
        if name == b"fmt ":
            header = data[start : start + size]
            if size < _MIN_FORMAT_BYTES:
                raise MediaError(f"damaged WAV: its 'fmt ' chunk has {size} bytes; it needs {_MIN_FORMAT_BYTES}")
    raise MediaError(f"truncated WAV: {len(data)} bytes without a data chunk")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each chunk, and the start and the claimed size of its content."""
    for count, chunk in enumerate(_wave64_chunks(data) if data[:4] == b"riff" else _riff_chunks(data, 12)):
        if count == MAX_CHUNKS:
            raise MediaError(f"the WAV has more than the allowed {MAX_CHUNKS} chunks")
        yield chunk


def _riff_chunks(data: bytes, position: int) -> Iterator[tuple[bytes, int, int]]:
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        yield data[position : position + 4], position + 8, size
        position += 8 + size + size % 2


def _wave64_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield chunks whose sizes include their header of 24 bytes; chunks begin at multiples of 8 bytes."""
    position = 40
    while position + 24 <= len(data):
        size = int.from_bytes(data[position + 16 : position + 24], "little")
        is_known = data[position + 4 : position + 16] == _WAVE64_GUID
        yield data[position : position + 4 if is_known else position + 16], position + 24, max(size - 24, 0)
        position += max(size + -size % 8, 24)


def _is_chunks(data: bytes, position: int) -> bool:
    """Return whether the rest of a file is nothing but complete chunks, as after a data chunk that really is empty."""
    if data[:4] == b"riff":
        return position == len(data)
    end = position
    for name, start, size in islice(_riff_chunks(data, position), MAX_CHUNKS):
        if not (name.isascii() and name.decode().isprintable()):
            return False
        end = start + size
    return end <= len(data) <= end + 1


def _chunk(name: bytes, content: bytes) -> bytes:
    return b"".join((name, len(content).to_bytes(4, "little"), content, bytes(len(content) % 2)))
