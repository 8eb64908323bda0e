"""The event loop that media are fetched on, in a thread of its own.

A slow server then holds no thread and no other loop, and callers with and without a loop of their own can wait for it.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

MAX_LOOKUPS: Final = 32  # names that are looked up at once; each takes a thread

_lock: Final = threading.Lock()
_loops: Final[list[asyncio.AbstractEventLoop]] = []


def fetch_loop() -> asyncio.AbstractEventLoop:
    """Return the loop, starting it on first use; it lasts as long as the process."""
    with _lock:
        if not _loops:
            loop = asyncio.new_event_loop()
            loop.set_default_executor(ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="mmlora-names"))
            threading.Thread(target=loop.run_forever, name="mmlora-fetch", daemon=True).start()
            _loops.append(loop)
        return _loops[0]
