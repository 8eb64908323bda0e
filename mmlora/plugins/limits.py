"""Limits of resolvers: number of blocking calls, file sizes, and containment in a root directory."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from mmlora.errors import AdapterError, ResolverError
from mmlora.lora.loading.files import CONFIG_FILE, WEIGHTS_FILE
from mmlora.utils.environment import read_number

P = ParamSpec("P")
T = TypeVar("T")

MAX_THREADS: Final = 64  # the default of `ResolutionLimits.max_pending`
MAX_BYTES_VARIABLE: Final = "MMLORA_LORA_RESOLVER_MAX_BYTES"
DEFAULT_MAX_BYTES: Final = 4 * 2**30


class ResolverThreads:
    """Runs the blocking calls of one resolver, each in its own daemon thread, so that a hung call blocks nothing else.

    A hung thread cannot be stopped. So each resolver has its own limited number of threads, instead of the pool of
    `asyncio.to_thread` that all resolvers would share, and none of them keeps the process from exiting.

    Args:
        max_threads: maximum number of concurrent calls, including abandoned ones that have not returned.
    """

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
        self._free = threading.BoundedSemaphore(max_threads)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread and return its result.

        Raises:
            ResolverError: too many calls have not returned, or no thread can be started.
        """
        if not self._free.acquire(blocking=False):
            raise ResolverError(f"{self._max_threads} calls have not ended, and no more are allowed at once")
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # so that a cancelled caller does not cancel the call

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


def check_containment(directory: Path, root: Path) -> None:
    """Check that an adapter's directory and its two files, with symbolic links resolved, lie under a root.

    Raises:
        AdapterError: one of them lies outside of `root` or cannot be resolved.
    """
    real_root = root.resolve()
    for path in (directory, directory / CONFIG_FILE, directory / WEIGHTS_FILE):
        try:
            real_path = path.resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError for a circle of links
            raise AdapterError(f"{path} cannot be followed: {error}") from None
        if not real_path.is_relative_to(real_root):
            raise AdapterError(f"{path} is {real_path}, which lies outside of {real_root}")


def check_size(name: str, num_bytes: int, max_bytes: int) -> None:
    """Check the size of a file, or the number of bytes read so far.

    Raises:
        AdapterError: it exceeds `max_bytes`.
    """
    if num_bytes > max_bytes:
        raise AdapterError(f"{name} has {num_bytes} bytes or more; {MAX_BYTES_VARIABLE} allows {max_bytes}")


def read_max_bytes() -> int:
    """Read the size limit of downloaded files from `MMLORA_LORA_RESOLVER_MAX_BYTES`.

    Raises:
        ConfigError: it is not a positive number.
    """
    return int(read_number(MAX_BYTES_VARIABLE, DEFAULT_MAX_BYTES))
