"""Small audio clips and pictures, generated from a seed."""

import numpy as np
from PIL import Image

RATE = 16000


def clip(seconds: float, seed: int) -> tuple[np.ndarray, int]:
    """Return a chirp with noise, and its sampling rate."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 900) * time * (1 + time))
    return (tone + 0.05 * rng.standard_normal(len(time))).astype(np.float32), RATE


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Return a picture of coarse coloured patches."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
