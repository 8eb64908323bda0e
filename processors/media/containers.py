"""Find truncated audio containers before decoding: libsndfile silently shortens them to what is there."""

from mmlora.errors import MediaError

# Encoders that stream to a pipe cannot go back to write the length; they claim almost 2 or 4 GiB.
_UNKNOWN_LENGTHS = (range(0x7FFFF000, 0x80000000), range(0xFFFFF000, 0x100000000))
_OGG_HEADER_BYTES = 27


def check_container(data: bytes) -> None:
    """Raise if a WAV data chunk or the last Ogg page claims more bytes than there are.

    FLAC is checked after decoding, against the number of samples that its header claims; MP3 in `mp3.py`.

    Raises:
        MediaError: the file is truncated; the message holds the claimed and the present size.
    """
    if data.startswith(b"RIFF"):
        _check_wav(data)
    elif data.startswith(b"OggS"):
        _check_ogg(data)


def _check_wav(data: bytes) -> None:
    position = 12
    while position + 8 <= len(data):
        chunk_id = data[position : position + 4]
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        present = len(data) - position - 8
        if chunk_id == b"data" and any(size in unknown for unknown in _UNKNOWN_LENGTHS):
            return
        if size > present:
            raise MediaError(f"truncated WAV: its {chunk_id!r} chunk claims {size} bytes, {present} are there")
        if chunk_id == b"data":
            return
        position += 8 + size + size % 2
    raise MediaError(f"truncated WAV: {len(data)} bytes without a data chunk")


def _check_ogg(data: bytes) -> None:
    position = 0
    while position < len(data):
        if data[position : position + 4] != b"OggS":
            position = data.find(b"OggS", position)  # padding between pages, or none left
            if position < 0:
                return
        segments_at = position + _OGG_HEADER_BYTES
        num_segments = data[segments_at - 1] if segments_at <= len(data) else 1
        lengths = data[segments_at : segments_at + num_segments]
        end = segments_at + num_segments + sum(lengths)
        if len(lengths) < num_segments or end > len(data):
            raise MediaError(f"truncated OGG: the page at byte {position} is longer than the {len(data)} bytes given")
        position = end
