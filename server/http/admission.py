"""Admission control: limits on the number of open requests, their duration, and the size of their bodies."""

import asyncio
import math
import re
import time
from collections import Counter, deque
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmlora.server.args import ServerArgs
from mmlora.server.errors import Refusal, error_response
from mmlora.server.http.auth import route_path
from mmlora.utils.text import shorten

MAX_RETRY_AFTER_S: Final = 60
NUM_TIMED: Final = 64  # most recent requests, whose end times give the rate at which requests end
_JSON_TYPE: Final = re.compile(r"application/([a-z0-9!#$&^_.-]+\+)?json\s*(;|$)", re.IGNORECASE)
ADAPTER_UPDATES: Final = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class Admission:
    """Counts open requests for generation, from their head to the end of the response, and refuses those over a limit.

    All methods are called on one event loop.

    Attributes:
        is_closed: whether new requests are refused because the server is shutting down.
        num_open: admitted requests that have not ended: being received, processed, waiting or running.
        num_refused: by reason, `queue_full` or `shutting_down`.
        request_timeout, body_timeout: in seconds; None means no limit.

    Args:
        capacity: maximum number of running requests.
        max_queued: maximum number of open requests beyond these.
        request_timeout: from the head of a request to the end of its response, in seconds.
        body_timeout: from the head of any request to the end of its body, in seconds.
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
        """Refuse all further requests."""
        self.is_closed = True

    def enter(self) -> None:
        """Admit a request; `leave` must follow.

        Raises:
            Refusal: 503 after `close`; 429 when too many are open.
        """
        if self.is_closed:
            self.num_refused["shutting_down"] += 1
            message = "the server is shutting down and accepts no further requests"
            raise Refusal(503, message, code="shutting_down", headers={"retry-after": "1", "connection": "close"})
        if self.num_open >= self._capacity + self._max_queued:
            self.num_refused["queue_full"] += 1
            wait_s = self.estimate_wait_s()
            message = (
                f"{self.num_open} requests are open; the limit is {self._capacity} running and {self._max_queued} "
                f"waiting; try again in {wait_s} s"
            )
            raise Refusal(429, message, code="queue_full", headers={"retry-after": str(wait_s)})
        self.num_open += 1

    def leave(self) -> None:
        """Record the end of an admitted request."""
        self.num_open -= 1
        self._ends_s.append(time.monotonic())

    def estimate_wait_s(self) -> int:
        """Estimate the seconds until all waiting requests have started, from the rate at which requests end."""
        num_waiting = max(1, self.num_open - self._capacity)
        num_ends = len(self._ends_s)
        # Measured until now, not until the last end: requests may have stalled since.
        mean_s = (time.monotonic() - self._ends_s[0]) / num_ends if num_ends else 1.0
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(num_waiting * mean_s)))


class AdmissionGate:
    """ASGI middleware that applies `Admission` before any of the body is read."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        admission, now = self._admission, asyncio.get_running_loop().time()
        if admission.body_timeout is not None:
            receive = _limit_body_time(receive, now + admission.body_timeout, admission.body_timeout)
        if not _is_generation(scope):
            return await self._app(scope, receive, send)
        try:
            admission.enter()
        except Refusal as refusal:
            return await error_response(refusal)(scope, receive, send)
        if admission.request_timeout is not None:
            scope.setdefault("state", {})["deadline"] = Deadline(now, admission.request_timeout)
        try:
            await self._app(scope, receive, send)
        finally:
            admission.leave()


class Deadline:
    """Time by which the response to a request must have ended.

    Args:
        start: when the request started, by the clock of the event loop.
        timeout: in seconds.
    """

    def __init__(self, start: float, timeout: float) -> None:
        self.end = start + timeout
        self._timeout = timeout

    def refusal(self) -> Refusal:
        """Return the error for a response that is not complete in time."""
        return Refusal(504, f"the response was not complete after {self._timeout:g} s", code="request_timeout")


def _is_generation(scope: Scope) -> bool:
    """Return whether a request runs the model, as every POST of OpenAI's API does, or decodes media for `/tokenize`."""
    path = route_path(scope)
    is_limited = path.startswith("/v1/") or path == "/tokenize"
    return scope["method"] == "POST" and is_limited and path not in ADAPTER_UPDATES


def _limit_body_time(receive: Receive, end: float, timeout: float) -> Receive:
    """Wrap `receive` so that the whole body must have been received by `end`."""
    is_complete = False

    async def receive_in_time() -> Message:
        nonlocal is_complete
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout_at(end):
                message = await receive()
        except TimeoutError:
            text = f"the body was not complete after {timeout:g} s"
            raise Refusal(408, text, code="body_timeout", headers={"connection": "close"}) from None
        is_complete = not message.get("more_body", False)
        return message

    return receive_in_time


async def read_body(request: Request, max_bytes: int, *, is_json: bool = True) -> bytes:
    """Read a body of at most `max_bytes`.

    A larger one is refused by its `content-length`, or as soon as more has arrived.

    Args:
        max_bytes: size limit.
        is_json: whether the body must be declared as JSON. Browsers send other types for any page without asking.

    Raises:
        Refusal: 415 for a body of another type, 413 for one that is too large, 400 for a `content-length` that is not
            a number.
    """
    if is_json:
        _check_json_type(request.headers)
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


def _check_json_type(headers: Headers) -> None:
    """Check that a body is declared as JSON; a request without a body declares nothing."""
    kinds = headers.getlist("content-type")
    if not kinds and "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
        return
    if not kinds or not all(_JSON_TYPE.match(kind) for kind in kinds):
        received = shorten(", ".join(kinds)) if kinds else "none"
        message = f"the body must have the header 'Content-Type: application/json'; received {received}"
        raise Refusal(415, message, param="body", code="unsupported_media_type")


def _too_large(size: str, max_bytes: int) -> Refusal:
    return Refusal(413, f"the request body has {size}; the limit is {max_bytes} bytes", code="request_too_large")
