"""`ResolverThreads`: the blocking calls of one resolver, which hold up nobody else when they hang."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, ParamSpec, TypeVar

from mmlora.errors import ResolverError

P = ParamSpec("P")
T = TypeVar("T")

MAX_THREADS: Final = 64  # as many names as are resolved at once


class ResolverThreads:
    """Run blocking calls, each in a thread of its own that does not keep the process from ending.

    A thread that hangs cannot be stopped. So a resolver shares none with other resolvers, as it would with
    `asyncio.to_thread`, and has only so many.

    Args:
        max_threads: most calls at once, those that nobody waits for any more included.
    """

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
        self._free = threading.BoundedSemaphore(max_threads)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function and wait for what it returns.

        Raises:
            ResolverError: too many calls have not ended, or the system gives no thread.
        """
        if not self._free.acquire(blocking=False):
            raise ResolverError(f"{self._max_threads} calls have not ended, and no more are allowed at once")
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # whoever leaves does not end the call

        def call() -> None:
            try:
                try:
                    result = function(*args, **kwargs)
                finally:
                    self._free.release()
                future.set_result(result)
            except BaseException as error:
                future.set_exception(error)

        try:
            threading.Thread(target=call, name="mmlora-resolver", daemon=True).start()
        except RuntimeError as error:
            self._free.release()
            raise ResolverError(f"no thread can be started: {error}") from error
        return await asyncio.wrap_future(future)
