"""Tell audio from image by magic bytes alone; names and MIME types are never looked at."""

from mmlora.processors.media.items import Modality

_BMP_HEADER_BYTES = frozenset({12, 40, 52, 56, 64, 108, 124})  # sizes of the known DIB headers
_TEXT_CONTROL = frozenset(b"\t\n\r\f\x1b")


def sniff(data: bytes) -> Modality | None:
    """Return the modality of encoded content, or None if it is no supported audio or image format.

    Audio: WAV, FLAC, OGG, MP3. Image: PNG, JPEG, WebP, GIF, BMP.
    """
    head = data[:64]
    if head.startswith(b"RIFF"):
        return {b"WAVE": "audio", b"WEBP": "image"}.get(head[8:12])  # type: ignore[return-value]
    if head.startswith((b"fLaC", b"OggS", b"ID3")) or _is_mp3_frame(head):
        return "audio"
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")) or _is_bmp(head):
        return "image"
    return None


def describe(data: bytes) -> str:
    """Name unsupported content for an error message, as well as its first bytes tell."""
    head = data[:512]
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("ascii", "replace").strip()
        return f"an MP4-family container (brand {brand!r}: MP4, M4A, HEIC or AVIF)"
    for magic, name in _KNOWN_BUT_UNSUPPORTED.items():
        if head.startswith(magic):
            return name
    if _is_text(head):
        return f"text beginning with {head[:32].decode('utf-8', 'replace')!r}"
    return f"unknown bytes beginning with {head[:12].hex(' ')}"


_KNOWN_BUT_UNSUPPORTED = {
    b"\x1aE\xdf\xa3": "a Matroska or WebM container",
    b"FORM": "an AIFF file",
    b"II*\x00": "a TIFF image",
    b"MM\x00*": "a TIFF image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "gzip data",
    b"RF64": "an RF64 file",
    b"RIFF": "a RIFF container that is neither WAVE nor WEBP",
}


def _is_mp3_frame(head: bytes) -> bool:
    """Check an MPEG audio layer III frame header; layer bits 01 keep out ADTS AAC and the UTF-16 byte-order mark."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return False
    version, bitrate, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    return version != 1 and bitrate != 15 and rate != 3  # the reserved values


def _is_bmp(head: bytes) -> bool:
    return head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES


def _is_text(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        return True
    # A UTF-8 character may be cut at the end of the window.
    text = head.decode("utf-8", "ignore").encode()
    return len(head) - len(text) <= 3 and all(byte >= 32 or byte in _TEXT_CONTROL for byte in head)
