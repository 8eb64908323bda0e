"""Bundled sample audio clips."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

_FOLDER = Path(__file__).parent / "samples"


class AudioAsset:
    """A bundled clip of English speech.

    Args:
        name: One of `AudioAsset.names()`.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, name: str) -> None:
        if name not in self.names():
            raise ValueError(f"unknown audio asset {name!r}; known: {', '.join(self.names())}")
        self.name = name

    @staticmethod
    def names() -> list[str]:
        """Return the names of all bundled clips."""
        return sorted(path.stem for path in _FOLDER.glob("*.flac"))

    @property
    def path(self) -> Path:
        """The FLAC file of the clip."""
        return _FOLDER / f"{self.name}.flac"

    @cached_property
    def audio_and_sample_rate(self) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int]:
        """The mono samples, fp32 in [-1, 1], and their rate in Hz."""
        import soundfile

        samples, rate = soundfile.read(self.path, dtype="float32")
        return samples, int(rate)
