"""Audio: encoded bytes or arrays to `AudioItem` (decoding, scaling, mixing to mono) and resampling.

soundfile, PyAV and librosa are optional and are imported on first use.
"""

import errno
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from mmlora.errors import MediaError
from mmlora.processors.media.containers import CONTAINER_CHECKS, claimed_mp3_frames, is_chained_ogg, skip_id3
from mmlora.processors.media.items import DEFAULT_LIMITS, MediaItem, MediaLimits, is_array, to_numpy
from mmlora.processors.media.wav import MPEG_LAYER_3, is_wav, read_wav
from mmlora.utils.text import shorten

MIN_RATE, MAX_RATE = 1_000, 384_000  # Hz
MAX_CHANNELS = 32
MAX_PEAK = 16.0  # float samples above full scale occur (resampling, mixing); far above it they are unscaled integers
RESAMPLER = "soxr_hq"

Samples = npt.NDArray[np.float32]

_MAGIC: Final = {b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3", b"\x1aE\xdf\xa3": "matroska"}
# Of images in the MP4 family, such as HEIC and AVIF.
_IMAGE_BRANDS: Final = frozenset(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1", b"avif", b"avis", b"crx ")
)
# Decoders that FFmpeg may use, by `audio_format`, which is also FFmpeg's name; libsndfile reads WAV and FLAC.
DECODERS: Final[Mapping[str, tuple[str, ...]]] = {
    "mp3": ("mp3float",),
    "aac": ("aac",),
    "mp4": ("aac", "alac", "mp3float", "opus", "flac"),
    "matroska": ("opus", "vorbis", "aac", "mp3float", "flac"),
    "ogg": ("opus", "vorbis", "flac"),
}
# Frames of one second at the highest sampling rate; damaged ones take time, too, but have no duration.
MAX_PACKETS_PER_S: Final = {"mp3": 48_000 / 1152, "aac": 96_000 / 960, "others": 1000.0}
_RAW_STREAMS: Final = ("mp3", "aac", "ogg")  # may be cut anywhere: the first and the last frame may be incomplete
_MAX_STREAMS: Final = 32  # of one container
_FFMPEG_OPTIONS: Final = {"protocol_whitelist": "none", "max_streams": str(_MAX_STREAMS + 1)}
_DISPOSITION_DEFAULT: Final = 1  # AV_DISPOSITION_DEFAULT

_BLOCK_FRAMES: Final = 1 << 16
_UNKNOWN_FRAMES: Final = 1 << 62
_INTEGER_SCALE: Final = {"uint8": 2.0**7, "int8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}
_FORM: Final = (
    "audio arrays are given as (array, sample_rate), the array of shape [num_samples], [n, channels] or [channels, n]"
)


class _UndecodableError(Exception):
    """A decoder cannot read the content, for the reason in the message."""


@dataclass(frozen=True, eq=False)
class AudioItem(MediaItem):
    """A mono clip.

    Attributes:
        content_hash: of the samples and the rate.
        samples: `[num_samples] float32`, full scale −1…1, read-only.
        sample_rate: Hz.
    """

    modality: ClassVar[str] = "audio"
    samples: Samples
    sample_rate: int

    @classmethod
    def from_samples(cls, samples: Samples, sample_rate: int) -> "AudioItem":
        """Take ownership of checked mono samples, freeze them and hash them."""
        samples = np.ascontiguousarray(samples, dtype=np.float32)
        samples.setflags(write=False)
        digest = hashlib.sha256(f"audio:{sample_rate}:".encode())
        digest.update(samples.data)
        return cls(digest.hexdigest(), samples, sample_rate)

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.sample_rate

    @property
    def num_bytes(self) -> int:
        return self.samples.nbytes

    @property
    def dimensions(self) -> dict[str, int]:
        return {"num_samples": len(self.samples), "sample_rate": self.sample_rate}

    def chunks(self) -> Iterator[memoryview]:
        yield self.samples.data.cast("B")

    @classmethod
    def receive(cls, header: Mapping[str, Any], read: Callable[[int], bytearray], limits: MediaLimits) -> Self:
        num_samples, rate = int(header["num_samples"]), int(header["sample_rate"])
        if not 0 < num_samples <= limits.max_samples:
            raise ValueError(f"audio of {num_samples} samples is not within the limits")
        samples = np.frombuffer(read(4 * num_samples), np.float32)
        samples.setflags(write=False)
        return cls(str(header["content_hash"]), samples, rate)


def audio_format(data: bytes) -> str | None:
    """Return the format of an audio file by its magic bytes, or None if it is not a supported one."""
    head = data[:64]
    if is_wav(head):
        return "wav"
    if head[4:8] == b"ftyp":
        return None if head[8:12] in _IMAGE_BRANDS else "mp4"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), _mpeg_audio_format(head))


def is_audio_file(data: bytes) -> bool:
    """Return whether a file is audio of a supported format, by its first bytes."""
    return audio_format(data) is not None


def decode_audio(data: bytes, limits: MediaLimits = DEFAULT_LIMITS) -> AudioItem:
    """Decode encoded bytes to mono float32; the declared length is checked first, the real one while decoding.

    libsndfile reads WAV, FLAC and Ogg. FFmpeg reads MP3, raw AAC (ADTS), MP4 (M4A, QuickTime), WebM (Matroska), and the
    Ogg streams that libsndfile cannot read; the default audio track is decoded.

    Raises:
        MediaError: undecodable, truncated, too long, no audio track, no samples, not finite.
    """
    data = skip_id3(data)
    name = audio_format(data) or "mp3"  # after an ID3 tag, padding may precede the first frame
    if name in CONTAINER_CHECKS:
        CONTAINER_CHECKS[name](data)
    try:
        samples, rate = _read(data, name, limits)
    except _UndecodableError as error:
        raise MediaError(f"cannot decode the audio content ({len(data)} bytes): {error}") from error
    except ImportError as error:
        raise MediaError(
            f"decoding this audio needs the package {error.name}; (array, sample_rate) needs none"
        ) from error
    return _checked_item(samples, rate)


def is_audio_pair(content: object) -> bool:
    """Return whether an object is a tuple or list, the form of `(array, sample_rate)`."""
    return isinstance(content, tuple | list)


def audio_from_pair(pair: tuple[Any, ...] | list[Any], limits: MediaLimits = DEFAULT_LIMITS) -> AudioItem:
    """Convert `(array, sample_rate)`: samples (numpy, torch or a list of floats) with one or more channels.

    Integers are scaled by the full scale of their type. Of two dimensions, the shorter one is the channels
    (`[n, channels]` if both are equal), which are averaged. The array is copied.

    Raises:
        MediaError: another tuple or list, a wrong type or shape, empty, too long, an invalid rate, samples not finite.
    """
    if len(pair) != 2:
        raise MediaError(f"a {type(pair).__name__} of {len(pair)} items is not media; audio is (array, sample_rate)")
    if isinstance(pair[0], int | float) and is_array(pair[1]):
        raise MediaError("got (sample_rate, array); audio is given as (array, sample_rate)")
    rate, values = checked_rate(pair[1]), _sample_array(pair[0])
    if values.ndim not in (1, 2):
        raise MediaError(f"audio array of shape {values.shape}: {_FORM}")
    if values.size == 0:
        raise MediaError(f"audio array of shape {values.shape} holds no samples")
    if values.ndim == 2 and values.shape[0] < values.shape[1]:
        values = values.T
    _check_channels(1 if values.ndim == 1 else values.shape[1])
    _check_duration(len(values), rate, limits)
    samples = _scaled(values)
    if samples.ndim == 2:
        samples = samples.mean(axis=1, dtype=np.float32)
    return _checked_item(samples, rate)


def resample(item: AudioItem, rate: int) -> Samples:
    """Return `[num_samples] float32` at `rate` Hz; the item's own samples if it already has that rate.

    Raises:
        MediaError: the item has no samples, or librosa is not installed.
    """
    if len(item.samples) == 0:
        raise MediaError("the audio holds no samples")
    if item.sample_rate == rate:
        return item.samples
    try:
        import librosa
    except ImportError as error:
        raise MediaError(
            f"resampling audio from {item.sample_rate} to {rate} Hz needs the package librosa; send it at {rate} Hz"
        ) from error
    samples = librosa.resample(item.samples, orig_sr=item.sample_rate, target_sr=rate, res_type=RESAMPLER)
    return np.asarray(samples, dtype=np.float32)


def checked_rate(rate: Any) -> int:
    """Return a sample rate in Hz as an int, or raise `MediaError`."""
    is_number = isinstance(rate, int | float | np.integer | np.floating) and not isinstance(rate, bool)
    if not is_number or not MIN_RATE <= rate <= MAX_RATE or int(rate) != rate:
        got = repr(rate) if is_number else f"a {type(rate).__name__}"
        raise MediaError(f"sample rate {got}: it must be a whole number of {MIN_RATE} to {MAX_RATE} Hz; {_FORM}")
    return int(rate)


def _mpeg_audio_format(head: bytes) -> str | None:
    """Recognize the header of an MPEG audio layer III frame or of an ADTS frame."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, bitrate, rate = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    if layer == 0 and version >= 2:
        return "aac" if head[2] >> 2 & 15 < 13 else None
    # Excluding the reserved values also excludes the UTF-16 byte-order mark.
    return "mp3" if layer == 1 and version != 1 and bitrate != 15 and rate != 3 else None


def _read(data: bytes, name: str, limits: MediaLimits) -> tuple[Samples, int]:
    """Decode one format with the library for it; return mono samples and their rate."""
    if name == "wav":
        wav = read_wav(data)
        if wav.format_tag == MPEG_LAYER_3:
            return _read_ffmpeg(wav.samples, "mp3", limits)
        return _read_soundfile(wav.to_bytes(), name, limits)
    if name == "ogg":
        return _read_ogg(data, limits)
    return _read_ffmpeg(data, name, limits) if name in DECODERS else _read_soundfile(data, name, limits)


def _read_ogg(data: bytes, limits: MediaLimits) -> tuple[Samples, int]:
    """Decode with libsndfile, or else with FFmpeg, which ignores the granule positions and reads chained streams."""
    if not is_chained_ogg(data):
        with suppress(_UndecodableError):
            samples, rate = _read_soundfile(data, "ogg", limits)
            if len(samples) > 0:
                return samples, rate
    return _read_ffmpeg(data, "ogg", limits)


def _read_soundfile(data: bytes, name: str, limits: MediaLimits) -> tuple[Samples, int]:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, claimed = checked_rate(file.samplerate), int(file.frames)
            _check_channels(file.channels)
            if claimed >= _UNKNOWN_FRAMES:  # FLAC written to a pipe
                claimed = 0
            if name == "ogg":
                file.seek(0)  # libsndfile then skips what precedes the start of the stream
            # soundfile would seek to the claimed position after each block, and repeat samples after a gap in an Ogg.
            file.seekable = lambda: False
            _check_duration(claimed, rate, limits)
            samples = _read_mono(file, min(int(limits.max_duration_s * rate), limits.max_samples) + 1)
    except MediaError:
        raise
    except (soundfile.SoundFileError, RuntimeError, ValueError, OSError) as error:
        # Unlike the exception's text, `error_string` has no address of our buffer.
        raise _UndecodableError(getattr(error, "error_string", error)) from error
    _check_duration(len(samples), rate, limits)
    if name == "flac" and len(samples) < claimed:  # of an Ogg it is an estimate
        raise MediaError(f"truncated audio: its header claims {claimed} samples, {len(samples)} could be decoded")
    return samples, rate


def _read_mono(file: Any, max_frames: int) -> Samples:
    """Read in blocks, so that memory use depends on the decoded samples and not on the header."""
    blocks, num_frames = [], 0
    while num_frames < max_frames:
        block = file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)  # [frames, channels]
        if len(block) == 0:
            break
        blocks.append(block.mean(axis=1, dtype=np.float32) if block.shape[1] > 1 else block[:, 0])
        num_frames += len(block)
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)


def _read_ffmpeg(data: bytes, name: str, limits: MediaLimits) -> tuple[Samples, int]:
    """Decode one format with its allowed decoders; FFmpeg probes no other format and opens no other file."""
    import av

    options = {**_FFMPEG_OPTIONS, "format_whitelist": name, "codec_whitelist": ",".join(DECODERS[name])}
    claimed = claimed_mp3_frames(data) if name == "mp3" else None
    try:
        with av.open(
            io.BytesIO(data), format=name, options=options, io_open=_refuse_to_open, metadata_errors="ignore"
        ) as container:
            if len(container.streams) > _MAX_STREAMS:
                raise _UndecodableError(f"it has more than {_MAX_STREAMS} streams")
            track = _audio_track(container.streams.audio, name)
            if track.duration is not None and (claimed is not None or name == "mp4"):  # otherwise it is an estimate
                rate = checked_rate(track.codec_context.rate)
                _check_duration(int(track.duration * track.time_base * rate), rate, limits)
            samples, rate, num_packets = _decode_track(container, track, limits, name)
    except av.FFmpegError as error:
        # FFmpeg's MP4 demuxer reports a stream beyond the limit as ENOMEM.
        is_limit = error.errno == errno.ENOMEM
        reason = f"it has more than {_MAX_STREAMS} streams, or needs too much memory" if is_limit else error.strerror
        raise _UndecodableError(reason) from error
    if claimed is not None and num_packets + 1 < claimed:
        raise MediaError(f"truncated MP3: its header claims {claimed} frames, {num_packets} are there")
    return samples, rate


def _audio_track(tracks: Sequence[Any], name: str) -> Any:
    """Return the audio track that is marked as the default, or the first one."""
    if not tracks:
        raise MediaError(f"the {name} file has no audio track")
    track = next((track for track in tracks if track.disposition & _DISPOSITION_DEFAULT), tracks[0])
    codec = track.codec_context.name if track.codec_context is not None else "unknown"
    if codec not in DECODERS[name]:
        raise MediaError(f"the audio codec is {codec}; allowed in {name} files are {', '.join(DECODERS[name])}")
    track.codec_context.thread_count = 1
    return track


def _decode_track(container: Any, track: Any, limits: MediaLimits, name: str) -> tuple[Samples, int, int]:
    """Return mono samples, their rate and the number of packets; of raw streams, damaged packets are skipped."""
    import av

    blocks, num_frames, num_packets = [np.empty(0, np.float32)], 0, 0
    max_packets = int(limits.max_duration_s * MAX_PACKETS_PER_S.get(name, MAX_PACKETS_PER_S["others"])) + 100
    rates: set[int] = set()
    converters: dict[tuple[str, str], Any] = {}
    for packet in container.demux(track):
        num_packets += packet.size > 0
        if num_packets > max_packets:
            raise MediaError(f"the {name} audio has more than {max_packets} frames, too many for its allowed duration")
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if name not in _RAW_STREAMS:
                raise
            continue
        for frame in frames:
            rates.add(checked_rate(frame.rate))
            if len(rates) > 1:
                raise MediaError(f"the sample rate changes within the clip: {sorted(rates)} Hz")
            num_frames += frame.samples
            _check_duration(num_frames, frame.rate, limits)
            channels = frame.layout.nb_channels
            _check_channels(channels)
            # Interleaved floats: PyAV reads beyond the planes of a planar frame of eight or more channels.
            source = (frame.format.name, frame.layout.name)
            if source not in converters:
                converters[source] = av.AudioResampler(format="flt")
            for converted in converters[source].resample(frame):
                block = converted.to_ndarray().reshape(-1, channels)
                blocks.append(block.mean(axis=1, dtype=np.float32) if channels > 1 else block[:, 0])
    if not rates:
        raise MediaError("no audio could be decoded from the content")
    return np.concatenate(blocks), rates.pop(), num_packets


def _refuse_to_open(url: str, *_: Any) -> None:
    raise MediaError(f"the container refers to another file ({shorten(url)}), which is not opened")


def _sample_array(array: Any) -> npt.NDArray[Any]:
    if is_array(array):
        return to_numpy(array)
    if isinstance(array, list | tuple):
        try:
            return np.asarray(array, dtype=np.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise MediaError(f"audio list cannot be read as samples: {error}; {_FORM}") from error
    raise MediaError(f"audio samples are a {type(array).__name__}; {_FORM}")


def _scaled(values: npt.NDArray[Any]) -> Samples:
    if np.issubdtype(values.dtype, np.floating):
        return values.astype(np.float32)
    scale = _INTEGER_SCALE.get(values.dtype.name)
    if scale is None:
        raise MediaError(f"audio array of {values.dtype}: samples must be floats or one of {', '.join(_INTEGER_SCALE)}")
    offset = scale if values.dtype == np.uint8 else 0.0
    return ((values.astype(np.float64) - offset) / scale).astype(np.float32)


def _checked_item(samples: Samples, rate: int) -> AudioItem:
    if len(samples) == 0:
        raise MediaError("the audio content holds no samples")
    peak = float(np.abs(samples).max())
    if not np.isfinite(peak):
        raise MediaError("the audio holds NaN or infinite samples; they must be finite, full scale being −1…1")
    if peak > MAX_PEAK:
        raise MediaError(
            f"float audio samples reach {peak:g}; full scale is −1…1 (divide integer PCM by its full scale first)"
        )
    return AudioItem.from_samples(samples, rate)


def _check_channels(channels: int) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise MediaError(f"audio of {channels} channels: 1 to {MAX_CHANNELS} are allowed")


def _check_duration(num_frames: int, rate: int, limits: MediaLimits) -> None:
    if num_frames > limits.max_samples:
        raise MediaError(f"audio of {num_frames} samples: at most {limits.max_samples} are allowed")
    if num_frames > limits.max_duration_s * rate:
        raise MediaError(
            f"audio of {num_frames} samples at {rate} Hz lasts {num_frames / rate:.1f} s, "
            f"more than the allowed {limits.max_duration_s:g} s"
        )
