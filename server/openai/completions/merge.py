"""`merge`: several async iterators as one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def merge(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[T, None]:
    """Yield what each source brings, as it comes; the first failure, or leaving early, ends them all.

    Each source is run, and closed if it is a generator, in one task.

    Raises:
        Exception: what a source raised.
    """
    arrived: asyncio.Queue[T | _End] = asyncio.Queue()
    tasks = [asyncio.create_task(_move(source, arrived)) for source in sources]
    num_running = len(tasks)
    try:
        while num_running:
            item = await arrived.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                num_running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _End:
    """Ends a source in the queue of what arrived."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error


async def _move(source: AsyncIterator[T], arrived: "asyncio.Queue[T | _End]") -> None:
    failure = None
    try:
        async for item in source:
            arrived.put_nowait(item)
    except Exception as error:
        failure = error
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
    arrived.put_nowait(_End(failure))
