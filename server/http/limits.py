"""What a client may do to the connection: how much it may send, and that leaving early stops the work."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request

from mmlora.server.errors import Refusal

T = TypeVar("T")
DEFAULT_MAX_REQUEST_BYTES: Final = 128 * 2**20


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a body of at most `max_bytes`; a larger one is refused by its claim, or as soon as it has grown too large.

    Raises:
        Refusal: 413 for a body that is too large, 400 for a claim that is no number.
    """
    claim = request.headers.get("content-length")
    if claim is not None and not claim.isdecimal():
        raise Refusal(400, f"content-length is {claim!r}; it must be a number of bytes")
    if claim is not None and int(claim) > max_bytes:
        raise _too_large(f"{claim} bytes", max_bytes)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(f"at least {size} bytes", max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, cancelling it when the client leaves. The body must have been read before.

    Raises:
        ClientDisconnect: the client left first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(size: str, max_bytes: int) -> Refusal:
    return Refusal(413, f"the request body has {size}; allowed are {max_bytes} bytes", code="request_too_large")
