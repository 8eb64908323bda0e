"""The frames of an MP3: decoders guess its length from the first one unless a tag in the file tells it."""

from collections.abc import Iterator
from dataclasses import dataclass

from mmlora.errors import MediaError

_KBITS = {  # of layer III, by version and index
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz, by version bits
_TAG_KBITS_INDEX = 9  # a frame of this rate has room for the tag in every version
_HAS_NUM_FRAMES = 1


@dataclass(frozen=True)
class _Frame:
    """One frame: where it starts, its four header bytes, and its length in bytes."""

    start: int
    header: bytes
    num_bytes: int

    @property
    def side_info_end(self) -> int:
        """Offset in the frame after header and side information, where a tag may stand."""
        is_mono = self.header[3] >> 6 == 3
        if self.header[1] >> 3 & 1:
            return 4 + (17 if is_mono else 32)
        return 4 + (9 if is_mono else 17)


def with_length(data: bytes) -> bytes:
    """Return the MP3 with a tag that tells its number of frames, if it has none, or one that knows less than all.

    Without it libsndfile takes the rate of the first frame for that of all, and cuts or refuses what lasts longer.

    Raises:
        MediaError: its own tag claims more frames than there are.
    """
    frames = list(_frames(data))
    if not frames:
        return data
    first, claimed = frames[0], _claimed_frames(data, frames[0])
    count = len(frames) - (claimed is not None)
    if claimed is not None and claimed > count + 1:
        raise MediaError(f"truncated MP3: its header claims {claimed} frames, {count} are there")
    if claimed is not None and claimed >= count - 1:
        return data
    audio = frames[min(claimed is not None, len(frames) - 1)]
    return _tag(first, count) + data[audio.start :]


def _frames(data: bytes) -> Iterator[_Frame]:
    """Walk the whole frames behind an ID3v2 tag, past whatever lies between them."""
    position = _id3_bytes(data)
    while position + 4 <= len(data):
        frame = _frame_at(data, position)
        if frame is None:
            position = data.find(b"\xff", position + 1)
            if position < 0:
                return
            continue
        if position + frame.num_bytes > len(data):
            return
        yield frame
        position += frame.num_bytes


def _frame_at(data: bytes, start: int) -> _Frame | None:
    header = data[start : start + 4]
    version_bits, layer_bits = header[1] >> 3 & 3, header[1] >> 1 & 3
    kbits_index, rate_index = header[2] >> 4, header[2] >> 2 & 3
    is_sync = header[0] == 0xFF and header[1] >> 5 == 7
    if not is_sync or version_bits == 1 or layer_bits != 1 or rate_index == 3 or not 0 < kbits_index < 15:
        return None
    return _Frame(start, header, _frame_bytes(version_bits, kbits_index, rate_index, header[2] >> 1 & 1))


def _frame_bytes(version_bits: int, kbits_index: int, rate_index: int, padding: int) -> int:
    is_first = version_bits == 3
    kbits, rate = _KBITS[1 if is_first else 2][kbits_index], _RATES[version_bits][rate_index]
    return (144 if is_first else 72) * 1000 * kbits // rate + padding


def _id3_bytes(data: bytes) -> int:
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    return 10 + size + (10 if data[5] & 0x10 else 0)


def _claimed_frames(data: bytes, frame: _Frame) -> int | None:
    """The number of frames that a tag in this frame tells; None if it holds audio."""
    tag = data[frame.start + frame.side_info_end : frame.start + frame.num_bytes]
    if tag[:4] in (b"Xing", b"Info"):
        return int.from_bytes(tag[8:12], "big") if tag[7] & _HAS_NUM_FRAMES else 0
    vbri = data[frame.start + 36 : frame.start + frame.num_bytes]
    return int.from_bytes(vbri[14:18], "big") if vbri[:4] == b"VBRI" else None


def _tag(model: _Frame, num_frames: int) -> bytes:
    """A silent frame like `model` with a tag."""
    version_bits, rate_index = model.header[1] >> 3 & 3, model.header[2] >> 2 & 3
    header = bytes((0xFF, model.header[1] | 1, _TAG_KBITS_INDEX << 4 | rate_index << 2, model.header[3]))
    tag = b"Xing" + _HAS_NUM_FRAMES.to_bytes(4, "big") + num_frames.to_bytes(4, "big")
    length = _frame_bytes(version_bits, _TAG_KBITS_INDEX, rate_index, 0)
    return (header.ljust(model.side_info_end, b"\0") + tag).ljust(length, b"\0")
