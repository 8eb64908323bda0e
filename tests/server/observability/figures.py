"""What a block costs this process, in which tests and server run together: bounded, and printed (`pytest -s`)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 2**20
_PROCESS = Path("/proc/self")


@contextmanager
def bounded(name: str, *, max_s: float = 60.0, max_bytes: int = 60 * MIB) -> Iterator[None]:
    """Fail if a block takes longer, or if memory grows further meanwhile; both bounds are generous."""
    (_PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    before, start = _resident("VmRSS"), time.monotonic()
    yield
    seconds, growth = time.monotonic() - start, max(0, _resident("VmHWM") - before)
    print(f"\n{name}: {seconds:.3f} s, {growth / MIB:.1f} MiB")
    assert seconds < max_s and growth < max_bytes


def _resident(field: str) -> int:
    """Bytes of memory now (`VmRSS`), or at the peak (`VmHWM`)."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
