"""HTTP/1.1 server: uvicorn with time limits on connections, and a graceful shutdown that drains requests.

Both classes override internals of uvicorn that have no stable interface, hence its upper bound in `pyproject.toml`.
"""

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from mmlora.async_llm import AsyncLLM
from mmlora.server.errors import Refusal, error_response
from mmlora.server.http.admission import Admission

logger = logging.getLogger(__name__)

HEADER_FIELDS_TOO_LARGE: Final = 431
# After the engine has stopped: time for the last responses, errors among them, to reach their clients.
LAST_WRITES_TIMEOUT_S: Final = 5


class ConnectionLimits:
    """Limits on the connections of a server, and the connections that count towards them.

    Attributes:
        header_timeout, write_timeout: see `Connection`.

    Args:
        max_connections: maximum number of open connections; a further one closes the connection that has been idle
            longest, or is closed itself if all are busy.
        header_timeout: seconds to receive the head of a request.
        write_timeout: seconds in which a client must read something while data is waiting for it.
    """

    def __init__(self, max_connections: int, header_timeout: float, write_timeout: float) -> None:
        self.header_timeout = header_timeout
        self.write_timeout = write_timeout
        self._max_connections = max_connections
        self._num_open = 0
        self._idle: dict[Connection, None] = {}  # longest idle first

    def add_connection(self, connection: "Connection") -> None:
        """Count a new connection; close one if there are too many."""
        self._num_open += 1
        if self._num_open > self._max_connections:
            next(iter(self._idle), connection).abort("there are too many connections")
        self._idle[connection] = None

    def remove_connection(self, connection: "Connection") -> None:
        """Stop counting a connection."""
        self._num_open -= 1
        self._idle.pop(connection, None)

    def mark_busy(self, connection: "Connection", is_busy: bool) -> None:
        """Record whether a connection has a request or waits for one."""
        if is_busy:
            self._idle.pop(connection, None)
        else:
            self._idle.setdefault(connection, None)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection with time limits, against slowloris attacks and stalled readers.

    The connection is aborted

    - when the head of a request is not complete `header_timeout` seconds after its first byte (for the first request:
      after the connection was made);
    - when the client goes on sending the body of a refused request for as long;
    - when the client has read nothing for `write_timeout` seconds while more data waits than the buffers hold, so
      that unread responses do not pile up.

    The time limit for bodies is in `AdmissionGate`, which can still send a response.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        limits: ConnectionLimits,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._limits = limits
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the read timer."""
        super().connection_made(transport)
        self._limits.add_connection(self)
        self._update_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._limits.remove_connection(self)
        self._read_timer = _cancel_timer(self._read_timer)
        self._write_timer = _cancel_timer(self._write_timer)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Handle data of the client."""
        super().data_received(data)
        self._update_read_timer()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._update_read_timer()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.pause_writing()  # a closing transport waits until the client has read everything: limit that, too

    def pause_writing(self) -> None:
        """Apply backpressure and start the write timer."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self._call_later(self._limits.write_timeout, "nothing was read")

    def resume_writing(self) -> None:
        """Stop the write timer: the client has read."""
        super().resume_writing()
        self._write_timer = _cancel_timer(self._write_timer)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, whether or not the last response was read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Refuse malformed HTTP with OpenAI's error body; 431 if the head is too large."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        if self.cycle is not None and not self.cycle.response_complete:  # malformed data in the middle of a request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            text = "the head of the request is too large" if status == HEADER_FIELDS_TOO_LARGE else msg
            response = error_response(Refusal(status, text))
            head = h11.Response(status_code=status, headers=[*response.raw_headers, (b"connection", b"close")])
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def abort(self, reason: str) -> None:
        """Close the connection and discard its buffers."""
        logger.debug("closing a connection: %s", reason)
        self.transport.abort()

    def _update_read_timer(self) -> None:
        """Run the read timer while a head, or the rest of a refused body, is expected."""
        is_busy = self.cycle is not None and not self.cycle.response_complete
        self._limits.mark_busy(self, is_busy)
        is_kept_alive = self.timeout_keep_alive_task is not None  # uvicorn's keep-alive timer runs instead
        if is_busy or is_kept_alive or self.transport.is_closing():
            self._read_timer = _cancel_timer(self._read_timer)
        elif self._read_timer is None:
            self._read_timer = self._call_later(self._limits.header_timeout, "no request was received")

    def _call_later(self, delay_s: float, reason: str) -> asyncio.TimerHandle:
        return self.loop.call_later(delay_s, self.abort, reason)


def _cancel_timer(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer and return what replaces it: None."""
    if timer is not None:
        timer.cancel()
    return None


class HTTPServer(uvicorn.Server):
    """Serves one application and shuts down gracefully.

    On the first SIGTERM or SIGINT it admits no further requests and drains the open ones for up to `drain_timeout`
    seconds; the remaining ones end with an error. A second signal ends the process immediately.

    Args:
        config: of uvicorn, with the application.
        llm: shut down before the last connection is closed.
        admission: of the application; closed at the first signal.
        drain_timeout: in seconds.
        on_ready: called when the server accepts connections.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        llm: AsyncLLM,
        admission: Admission,
        limits: ConnectionLimits,
        *,
        tls: ssl.SSLContext | None = None,
        drain_timeout: float,
        on_ready: Callable[[], None],
    ) -> None:
        config.timeout_graceful_shutdown = LAST_WRITES_TIMEOUT_S
        super().__init__(config)
        self._llm = llm
        self._admission = admission
        self._limits = limits
        self._tls = tls
        self._drain_timeout = drain_timeout
        self._drain_end_s = 0.0
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections on the given sockets."""
        loop = asyncio.get_running_loop()
        # uvicorn has no option for this timeout; asyncio's default is a minute.
        handshake_timeout = self._limits.header_timeout if self._tls is not None else None
        self.servers = [
            await loop.create_server(
                self._make_connection,
                sock=listener,
                backlog=self.config.backlog,
                ssl=self._tls,
                ssl_handshake_timeout=handshake_timeout,
            )
            for listener in sockets or []
        ]
        self.started = True
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one drains requests, the second one ends the process."""
        if self._admission.is_closed:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
        self.drain()

    def drain(self) -> None:
        """Admit no further requests; stop when the last one has ended, or after the drain timeout."""
        self._admission.close()
        self._drain_end_s = time.monotonic() + self._drain_timeout

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; uvicorn calls this ten times per second."""
        is_drained = self._admission.num_open == 0 or time.monotonic() >= self._drain_end_s
        return await super().on_tick(counter) or (self._admission.is_closed and is_drained)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End open requests with an error, then close the connections."""
        self._admission.close()
        await asyncio.to_thread(self._llm.shutdown)
        await super().shutdown(sockets)

    def _make_connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, self._limits)
