"""A web server on this machine that does what a test says, byte by byte, and names that lead wherever it likes."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

Route = Callable[[socket.socket], None]


@dataclass
class WebServer:
    """A server that answers each connection with the route of its path.

    Attributes:
        port: that it listens on, on every address of this machine.
        requests: the heads that came.
        num_left: connections that the client closed before the route was done.
    """

    routes: Mapping[str, bytes | Route]
    port: int = 0
    requests: list[str] = field(default_factory=list)
    num_left: int = 0

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    @property
    def paths(self) -> list[str]:
        return [head.split(" ")[1] for head in self.requests]

    def serve(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (received := connection.recv(65536)):
            head += received
        if not head:
            return
        self.requests.append(head.decode("latin-1"))
        route = self.routes.get(self.paths[-1], answer(b"", status="404 Not Found"))
        try:
            if callable(route):
                route(connection)
            else:
                connection.sendall(route)
        except OSError:
            self.num_left += 1


def answer(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """A whole answer; `length` is what its head claims."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def redirect(location: str) -> bytes:
    return answer(b"", f"Location: {location}", status="302 Found")


def drip(data: bytes, pause_s: float) -> Route:
    """Send a byte at a time."""

    def route(connection: socket.socket) -> None:
        for index in range(len(data)):
            connection.sendall(data[index : index + 1])
            time.sleep(pause_s)

    return route


def endless(head: bytes, piece: bytes) -> Route:
    """Send a head, then pieces until the client leaves."""

    def route(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    return route


@contextmanager
def run_web_server(
    routes: Mapping[str, bytes | Route], tls: ssl.SSLContext | None = None, host: str = ""
) -> Iterator[WebServer]:
    """Serve until the block ends."""
    server = WebServer(routes)
    listener = socket.create_server((host, 0), backlog=512)
    server.port = listener.getsockname()[1]

    def handle(connection: socket.socket) -> None:
        connection.settimeout(30)
        with suppress(OSError), connection:
            if tls is None:
                server.serve(connection)
            else:
                with tls.wrap_socket(connection, server_side=True) as wrapped:
                    server.serve(wrapped)

    def accept() -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                threading.Thread(target=handle, args=[listener.accept()[0]], daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


class Names:
    """Replaces the look-up of names: `answers` has lists of addresses, one for each look-up, the last for the rest.

    Attributes:
        lookups: the names that were looked up.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, list[list[str]]] = {}
        self.lookups: list[str] = []
        self._look_up = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in self.answers:
            return self._look_up(host, port, *args, **options)
        self.lookups.append(name)
        answers = self.answers[name]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        kinds = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in addresses]
        return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for kind, address in kinds]
