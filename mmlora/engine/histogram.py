"""`Histogram`: how many values fell into which range, as plain numbers."""

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

SECONDS: Final = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2.5, 5))  # 1 ms to 500 s
TOKENS: Final = tuple(2.0**power for power in range(18))


@dataclass(frozen=True)
class HistogramCounts:
    """A histogram at one moment.

    Attributes:
        bounds: upper ends of the ranges, which they include; the last range has none.
        cumulative: values up to each bound, then all values.
        total: sum of all values.
    """

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """Number of values."""
        return self.cumulative[-1]


class Histogram:
    """Counts values by range. Safe to use from several threads.

    Args:
        bounds: upper ends of the ranges, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count a value."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._total += value

    def counts(self) -> HistogramCounts:
        """The counts so far."""
        with self._lock:
            return HistogramCounts(self._bounds, tuple(accumulate(self._counts)), self._total)
