"""`Admission`: how many requests may be open at once, how long each may take, and whether new ones are let in."""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmlora.server.args import ServerArgs
from mmlora.server.errors import Refusal, error_response
from mmlora.server.http.auth import route_path

MAX_RETRY_AFTER_S: Final = 60
NUM_TIMED: Final = 64  # requests whose ends tell how fast they end
ADAPTER_UPDATES: Final = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class Admission:
    """Counts the requests that generate, from their head to the end of their answer, and refuses those beyond a bound.

    All methods are called on one event loop.

    Attributes:
        is_closed: no further request is let in, since the server is to stop.
        num_open: requests that were let in and have not ended: being read, made ready, waiting or running.
        num_refused: by reason, `queue_full` or `shutting_down`.
        request_timeout, body_timeout: seconds; None for as long as it takes.

    Args:
        capacity: requests that run at once.
        max_queued: requests that may be open beyond those.
        request_timeout: from the head of a request to the end of its answer, in seconds.
        body_timeout: from the head to the end of the body, of every request, in seconds.
    """

    def __init__(
        self,
        capacity: int,
        max_queued: int = ServerArgs.max_queued_requests,
        *,
        request_timeout: float | None = None,
        body_timeout: float | None = ServerArgs.body_timeout,
    ) -> None:
        self.is_closed = False
        self.num_open = 0
        self.num_refused: Counter[str] = Counter(queue_full=0, shutting_down=0)
        self.request_timeout = request_timeout
        self.body_timeout = body_timeout
        self._capacity = capacity
        self._max_queued = max_queued
        self._ends_s: deque[float] = deque(maxlen=NUM_TIMED)

    def close(self) -> None:
        """Let no further request in."""
        self.is_closed = True

    def enter(self) -> None:
        """Let a request in; `leave` must follow.

        Raises:
            Refusal: 503 after `close`; 429 when too many are open.
        """
        if self.is_closed:
            self.num_refused["shutting_down"] += 1
            message = "the server is shutting down and takes no further request"
            raise Refusal(503, message, code="shutting_down", headers={"retry-after": "1", "connection": "close"})
        if self.num_open >= self._capacity + self._max_queued:
            self.num_refused["queue_full"] += 1
            wait_s = self.estimate_wait_s()
            message = (
                f"{self.num_open} requests are open; allowed are {self._capacity} that run and {self._max_queued} that "
                f"wait; try again in {wait_s} s"
            )
            raise Refusal(429, message, code="queue_full", headers={"retry-after": str(wait_s)})
        self.num_open += 1

    def leave(self) -> None:
        """Note that a request has ended."""
        self.num_open -= 1
        self._ends_s.append(time.monotonic())

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold the place of a request that was let in."""
        try:
            yield
        finally:
            self.leave()

    def estimate_wait_s(self) -> int:
        """Seconds in which the requests that wait will have begun, if requests go on ending as fast as they did."""
        num_waiting = max(1, self.num_open - self._capacity)
        num_ends = len(self._ends_s)
        # The time since the last end counts: nothing may have ended for a while.
        mean_s = (time.monotonic() - self._ends_s[0]) / num_ends if num_ends else 1.0
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(num_waiting * mean_s)))


class AdmissionGate:
    """Has `Admission` decide before anything of a body is read.

    Args:
        app: the application.
        admission: of its server.
    """

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        admission, now = self._admission, asyncio.get_running_loop().time()
        if admission.body_timeout is not None:
            receive = _until_body_is_late(receive, now + admission.body_timeout, admission.body_timeout)
        if not _is_generating(scope):
            return await self._app(scope, receive, send)
        try:
            admission.enter()
        except Refusal as refusal:
            return await error_response(refusal)(scope, receive, send)
        with admission.admitted():
            if admission.request_timeout is not None:
                scope.setdefault("state", {})["deadline"] = Deadline(now, admission.request_timeout)
            await self._app(scope, receive, send)


class Deadline:
    """When the answer to a request must have ended.

    Args:
        start: of the request, by the clock of the event loop.
        timeout: seconds.
    """

    def __init__(self, start: float, timeout: float) -> None:
        self.end = start + timeout
        self._timeout = timeout

    def refusal(self) -> Refusal:
        """What is told when it has passed."""
        return Refusal(504, f"the answer was not complete after {self._timeout:g} s", code="request_timeout")


def _is_generating(scope: Scope) -> bool:
    """Whether a request asks for work of the model: every POST of OpenAI's API does."""
    path = route_path(scope)
    return scope["method"] == "POST" and path.startswith("/v1/") and path not in ADAPTER_UPDATES


def _until_body_is_late(receive: Receive, end: float, timeout: float) -> Receive:
    """Receive the messages of a request; the last one of its body must have come by `end`."""
    is_whole = False

    async def receive_in_time() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()
        try:
            async with asyncio.timeout_at(end):
                message = await receive()
        except TimeoutError:
            text = f"the body was not complete after {timeout:g} s"
            raise Refusal(408, text, code="body_timeout", headers={"connection": "close"}) from None
        is_whole = not message.get("more_body", False)
        return message

    return receive_in_time


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a body of at most `max_bytes`.

    A larger one is refused by its `content-length`, or as soon as more has arrived.

    Raises:
        Refusal: 413 for a body that is too large, 400 for a `content-length` that is not a number.
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


def _too_large(size: str, max_bytes: int) -> Refusal:
    return Refusal(413, f"the request body has {size}; allowed are {max_bytes} bytes", code="request_too_large")
