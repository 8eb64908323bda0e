"""`Connection`: HTTP/1.1 on one connection, which a client cannot hold by sending or reading slowly, or not at all."""

import asyncio
import logging
import sys
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from mmlora.server.errors import Refusal, error_response

logger = logging.getLogger(__name__)
TOO_LARGE = 431


class ConnectionLimits:
    """What the connections of a server may do.

    Attributes:
        head_timeout, write_timeout: see `Connection`.

    Args:
        max_connections: open ones; beyond them, the one that has waited longest for a request is closed, or the new
            one where all are busy.
        head_timeout: seconds in which the head of a request must have come, once it is awaited.
        write_timeout: seconds in which a client must have read some of what waits for it.
    """

    def __init__(self, max_connections: int, head_timeout: float, write_timeout: float) -> None:
        self.head_timeout = head_timeout
        self.write_timeout = write_timeout
        self._max_connections = max_connections
        self._num_open = 0
        self._idle: dict[Connection, None] = {}  # those that wait longest come first

    def open(self, connection: "Connection") -> None:
        """Count a connection, closing one where there are too many."""
        self._num_open += 1
        if self._num_open > self._max_connections:
            next(iter(self._idle), connection).drop("there are too many connections")
        self._idle[connection] = None

    def note(self, connection: "Connection", *, is_busy: bool) -> None:
        """Note whether a connection waits for a request, or has one."""
        if is_busy:
            self._idle.pop(connection, None)
        else:
            self._idle.setdefault(connection, None)

    def close(self, connection: "Connection") -> None:
        """Count a connection no more."""
        self._num_open -= 1
        self._idle.pop(connection, None)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with bounds on time.

    A connection is closed when the head of a request is not complete `head_timeout` seconds after its first byte (of
    the first request: after the connection was made), when the rest of a body that was refused goes on for as long,
    or when its client has read nothing for `write_timeout` seconds while more waits than the buffers take: an answer
    that nobody reads does not pile up.
    How long a body may take is the matter of `Admission`, which can answer.
    """

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], limits: ConnectionLimits
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._limits = limits
        self._read_clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self._limits.open(self)
        self._watch_reads()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._limits.close(self)
        self._read_clock = _stopped(self._read_clock)
        self._write_clock = _stopped(self._write_clock)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        super().data_received(data)
        self._watch_reads()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch_reads()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.pause_writing()  # it is closed when all is read, which may be never

    def pause_writing(self) -> None:
        """The client reads too slowly: wait for it, and for so long."""
        super().pause_writing()
        if self._write_clock is None:
            self._write_clock = self._call_later(self._limits.write_timeout, "nothing was read")

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._write_clock = _stopped(self._write_clock)

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which nothing was asked, whether the last answer was read or not."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in OpenAI's form; 431 for a head that is too large."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        if self.cycle is not None and not self.cycle.response_complete:  # in the middle of a request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            text = "the head of the request is too large" if status == TOO_LARGE else msg
            answer = error_response(Refusal(status, text))
            head = h11.Response(status_code=status, headers=[*answer.raw_headers, (b"connection", b"close")])
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def drop(self, reason: str) -> None:
        """Close the connection whatever stands in its buffers."""
        logger.debug("a connection is closed: %s", reason)
        self.transport.abort()

    def _watch_reads(self) -> None:
        """Have the clock run while a head, or the rest of a body that was answered, is awaited."""
        is_busy = self.cycle is not None and not self.cycle.response_complete
        self._limits.note(self, is_busy=is_busy)
        is_kept_alive = self.timeout_keep_alive_task is not None  # nothing has come, and another clock runs
        if is_busy or is_kept_alive or self.transport.is_closing():
            self._read_clock = _stopped(self._read_clock)
        elif self._read_clock is None:
            self._read_clock = self._call_later(self._limits.head_timeout, "no request came")

    def _call_later(self, seconds: float, reason: str) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, self.drop, reason)


def _stopped(clock: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if clock is not None:
        clock.cancel()
    return None
