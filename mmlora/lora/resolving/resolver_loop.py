"""The event loop that all resolvers are awaited on, in a thread of its own.

Clients of storage services are bound to the loop that they are first used on, so there is one for the whole process.
"""

import asyncio
import logging
import threading
from typing import Final

logger = logging.getLogger(__name__)

_lock: Final = threading.Lock()
_loops: Final[list[asyncio.AbstractEventLoop]] = []


def resolver_loop() -> asyncio.AbstractEventLoop:
    """Return the loop, starting it on first use."""
    with _lock:
        if not _loops:
            loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=[loop], name="mmlora-resolvers", daemon=True).start()
            _loops.append(loop)
        return _loops[0]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop for as long as the process lasts, though a task that a resolver started exits, or stops the loop."""
    while not loop.is_closed():
        try:
            loop.run_forever()
            logger.error("a resolver stopped the event loop of all resolvers; it goes on")
        except BaseException:
            logger.exception("a task of a resolver left the event loop of all resolvers; it goes on")
