"""`HTTPServer`: uvicorn with our connections, and an end that lets open requests finish."""

import asyncio
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

import uvicorn

from mmlora.async_llm import AsyncLLM
from mmlora.server.http.admission import Admission
from mmlora.server.http.connection import Connection, ConnectionLimits

LAST_WRITES_S: Final = 5  # for answers, errors among them, to reach clients once the engine has stopped
BACKLOG: Final = 2048


class HTTPServer(uvicorn.Server):
    """Serves one application.

    On the first SIGTERM or SIGINT it takes no further request, waits until those that are open have ended, at most
    `drain_timeout` seconds, ends the rest with an error, and stops. A second signal ends the process at once.

    Args:
        config: of uvicorn, with the application.
        llm: the engine behind it; is shut down before the last connection is closed.
        admission: of the application.
        limits: of its connections.
        tls: for TLS.
        drain_timeout: in seconds.
        on_ready: called when requests are served.
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
        config.timeout_graceful_shutdown = LAST_WRITES_S
        super().__init__(config)
        self._llm = llm
        self._admission = admission
        self._limits = limits
        self._tls = tls
        self._drain_timeout = drain_timeout
        self._drain_end_s = 0.0
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on sockets that are given."""
        loop = asyncio.get_running_loop()
        # uvicorn's own way lets a TLS handshake take a minute.
        handshake_timeout = self._limits.head_timeout if self._tls is not None else None
        self.servers = [
            await loop.create_server(
                self._connect,
                sock=listener,
                backlog=BACKLOG,
                ssl=self._tls,
                ssl_handshake_timeout=handshake_timeout,
            )
            for listener in sockets or []
        ]
        self.started = True
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first lets requests end, the second does not."""
        if self._admission.is_closed:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
        self.drain()

    def drain(self) -> None:
        """Take no further request, and stop when the last has ended, or at the latest after the drain timeout."""
        self._admission.close()
        self._drain_end_s = time.monotonic() + self._drain_timeout

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; asked ten times a second."""
        is_drained = self._admission.num_open == 0 or time.monotonic() >= self._drain_end_s
        return await super().on_tick(counter) or (self._admission.is_closed and is_drained)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is still open with an error, then close the connections."""
        self._admission.close()
        await asyncio.to_thread(self._llm.shutdown)
        await super().shutdown(sockets)

    def _connect(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, self._limits)
