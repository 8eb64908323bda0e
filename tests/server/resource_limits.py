"""Limits on the time and memory of a block in this process, which runs tests and server; printed with `pytest -s`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 2**20
_PROCESS = Path("/proc/self")


@contextmanager
def bounded(name: str, *, max_s: float = 60.0, max_bytes: int = 60 * MIB) -> Iterator[None]:
    """Fail if a block takes longer or memory grows more than allowed; both limits are generous."""
    (_PROCESS / "clear_refs").write_text("5")  # resets the peak
    before, start = _resident("VmRSS"), time.monotonic()
    yield
    seconds, growth = time.monotonic() - start, max(0, _resident("VmHWM") - before)
    print(f"\n{name}: {seconds:.3f} s, {growth / MIB:.1f} MiB")
    assert seconds < max_s and growth < max_bytes


def _resident(field: str) -> int:
    """Return the current (`VmRSS`) or peak (`VmHWM`) resident memory in bytes."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
