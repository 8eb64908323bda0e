"""Independent reference of Granite Speech's features in numpy, from the definition of a mel spectrogram."""

import math

import numpy as np
import torch

N_FFT, WINDOW, HOP, NUM_MELS, RATE = 512, 400, 160, 80, 16_000
PROJECTOR_WINDOW, DOWNSAMPLE = 15, 5


def features(samples: np.ndarray) -> torch.Tensor:
    """Return the features `[1, num_frames / 2, 160]` of `[num_samples]`."""
    window = np.zeros(N_FFT)
    first = (N_FFT - WINDOW) // 2
    window[first : first + WINDOW] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    padded = np.pad(samples.astype(np.float64), N_FFT // 2, mode="reflect")
    starts = range(0, len(padded) - N_FFT + 1, HOP)
    power = np.stack([np.abs(np.fft.rfft(padded[start : start + N_FFT] * window)) ** 2 for start in starts])
    logs = np.log10(np.maximum(power @ _filters(), 1e-10))
    logs = np.maximum(logs, logs.max() - 8) / 4 + 1
    return torch.from_numpy(logs[: len(logs) // 2 * 2].reshape(1, -1, 2 * NUM_MELS)).float()


def num_embeds(num_samples: int) -> int:
    """Return the number of embeddings: three for each window of fifteen frames."""
    num_frames = (num_samples // HOP + 1) // 2
    return math.ceil(num_frames / PROJECTOR_WINDOW) * (PROJECTOR_WINDOW // DOWNSAMPLE)


def _filters() -> np.ndarray:
    """Return triangular filters with corners evenly spaced on the HTK mel scale, `[257, 80]`."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, NUM_MELS + 2) / 2595) - 1)
    frequencies = np.linspace(0, RATE / 2, N_FFT // 2 + 1)[:, None]
    rising = (frequencies - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies) / (corners[2:] - corners[1:-1])
    return np.maximum(0, np.minimum(rising, falling))
