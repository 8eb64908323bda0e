"""The event loop that all resolvers are awaited on, in a thread of its own.

Clients of storage services are bound to the loop that they are first used on, so there is one for the whole process.
"""

import asyncio
import threading
from typing import Final

_lock: Final = threading.Lock()
_loops: Final[list[asyncio.AbstractEventLoop]] = []


def resolver_loop() -> asyncio.AbstractEventLoop:
    """Return the loop, starting it on first use."""
    with _lock:
        if not _loops:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="mmlora-resolvers", daemon=True).start()
            _loops.append(loop)
        return _loops[0]
