"""Turn encoded audio or arrays into `AudioItem`: decoding (soundfile), scaling, mixing to mono, resampling (librosa).

Both libraries are imported where they are used: the engine must import without them.
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmlora.errors import MediaError
from mmlora.processors.media.containers import check_container
from mmlora.processors.media.items import DEFAULT_LIMITS, AudioItem, MediaLimits
from mmlora.processors.media.mp3 import with_length

MIN_RATE, MAX_RATE = 1_000, 384_000  # Hz
MAX_CHANNELS = 32
MAX_PEAK = 16.0  # float samples above full scale occur (resampling, mixing); far above it they are unscaled integers
RESAMPLER = "soxr_hq"

_BLOCK_FRAMES = 1 << 16
_UNKNOWN_FRAMES = 1 << 62
_MP3_SLACK = 2 * 1152  # samples; an MP3 header may or may not count its own frame and the encoder delay
_INTEGER_SCALE = {"uint8": 2.0**7, "int8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}
_FORM = (
    "audio arrays are given as (array, sample_rate), the array of shape [num_samples], [n, channels] or [channels, n]"
)

Samples = npt.NDArray[np.float32]


def decode_audio(data: bytes, limits: MediaLimits = DEFAULT_LIMITS) -> AudioItem:
    """Decode WAV, FLAC, OGG or MP3 bytes to mono float32; the length is checked in the header first.

    Raises:
        MediaError: undecodable, truncated, too long, no samples, not finite.
    """
    try:
        import soundfile
    except ImportError as error:
        raise MediaError("decoding audio files needs the package soundfile; (array, sample_rate) needs none") from error
    check_container(data)
    if not data.startswith((b"RIFF", b"fLaC", b"OggS")):
        data = with_length(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, claimed = checked_rate(file.samplerate), int(file.frames)
            _check_channels(file.channels)
            if claimed >= _UNKNOWN_FRAMES:  # FLAC written to a pipe
                claimed = 0
                file.seekable = lambda: False  # soundfile would seek to the end that is not known
            _check_duration(claimed, rate, limits)
            samples = _read_mono(file, min(int(limits.max_duration_s * rate), limits.max_samples) + 1)
            slack = _MP3_SLACK if file.format == "MP3" else 0
    except (soundfile.SoundFileError, RuntimeError, ValueError, OSError) as error:
        reason = getattr(error, "error_string", error)  # without the address of our buffer, which soundfile tells
        raise MediaError(f"cannot decode the audio content ({len(data)} bytes): {reason}") from error
    _check_duration(len(samples), rate, limits)
    if len(samples) < claimed - slack:
        raise MediaError(f"truncated audio: its header claims {claimed} samples, {len(samples)} could be decoded")
    return _checked_item(samples, rate)


def audio_from_array(array: Any, sample_rate: Any, limits: MediaLimits = DEFAULT_LIMITS) -> AudioItem:
    """Take an array of samples (numpy, torch or a list of floats), integer or float, mono or not.

    Integers are scaled by the full scale of their type; of two dimensions the shorter one is the channels
    (`[n, channels]` if they are equal) and is averaged. The array is copied.

    Raises:
        MediaError: wrong type or shape, empty, too long, a rate that is not sane, samples not finite.
    """
    rate = checked_rate(sample_rate)
    values = _as_numpy(array)
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
    """Return `[num_samples] float32` at `rate` Hz; the item's own samples if it has that rate already.

    Raises:
        MediaError: there are none, or librosa is missing.
    """
    if len(item.samples) == 0:
        raise MediaError("the audio holds no samples")
    if item.sample_rate == rate:
        return item.samples
    try:
        import librosa
    except ImportError as error:
        raise MediaError(
            f"resampling audio from {item.sample_rate} to {rate} Hz needs the package librosa; give it at {rate} Hz"
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


def _read_mono(file: Any, max_frames: int) -> Samples:
    """Read in blocks, so that memory follows what is really decoded and not what a header claims."""
    blocks, num_frames = [], 0
    while num_frames < max_frames:
        block = file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)  # [frames, channels]
        if len(block) == 0:
            break
        blocks.append(block.mean(axis=1, dtype=np.float32) if block.shape[1] > 1 else block[:, 0])
        num_frames += len(block)
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)


def _as_numpy(array: Any) -> npt.NDArray[Any]:
    if isinstance(array, torch.Tensor):
        tensor = array.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(array, np.ndarray):
        return array
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
