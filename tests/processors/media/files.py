"""Audio files written by PyAV, for tests of the decoders."""

import tempfile
from fractions import Fraction

import av
import numpy as np

RATE = 16000
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
# name: FFmpeg's muxer, its encoder, the encoder's rate in Hz
FORMATS = {
    "m4a": ("ipod", "aac", RATE),
    "alac": ("ipod", "alac", RATE),
    "mp4": ("mp4", "aac", RATE),
    "mov": ("mov", "aac", RATE),
    "webm": ("webm", "libopus", 48000),
    "mkv": ("matroska", "flac", RATE),
    "adts": ("adts", "aac", RATE),
    "mp3": ("mp3", "libmp3lame", RATE),
}


def clip(seconds: float = 1.0, level: float = 0.5) -> np.ndarray:
    """A tone of 440 Hz: `[num_samples] float32`."""
    time_s = np.arange(int(seconds * RATE)) / RATE
    return (level * np.sin(2 * np.pi * 440 * time_s)).astype(np.float32)


def add_audio(container, encoder, rate, samples):
    """Add a track of `[num_samples]` or `[num_samples, channels]`; return its encoding function."""
    layout = LAYOUTS[1 if samples.ndim == 1 else samples.shape[1]]
    stream = container.add_stream(encoder, rate=rate, layout=layout)

    def encode():
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))

    return encode


def encode(name: str, samples: np.ndarray | None = None, *more: np.ndarray, **options: str) -> bytes:
    """Return an audio file with one track per array."""
    muxer, encoder, rate = FORMATS[name]
    with tempfile.NamedTemporaryFile() as file:  # muxers with the index in front read their own output
        with av.open(file.name, "w", format=muxer, options=options) as container:
            tracks = [clip() if samples is None else samples, *more]
            for finish in [add_audio(container, encoder, rate, track) for track in tracks]:
                finish()
        return file.read()
