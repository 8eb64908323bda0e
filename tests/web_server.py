"""A local web server whose responses a test controls byte by byte, and a fake DNS."""

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
    """A running web server.

    Attributes:
        routes: by path, the bytes of a response or a function that writes to the connection; others are 404.
        port: of the server, on every local address.
        requests: the heads that the server received.
        num_left: connections that the client closed before the route was finished.
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
        route = self.routes.get(self.paths[-1], http_response(b"", status="404 Not Found"))
        try:
            if callable(route):
                route(connection)
            else:
                connection.sendall(route)
        except OSError:
            self.num_left += 1


def http_response(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """Return a complete response; `length` overrides its Content-Length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def redirect(location: str) -> bytes:
    return http_response(b"", f"Location: {location}", status="302 Found")


def drip(data: bytes, pause_s: float) -> Route:
    """Return a route that sends one byte at a time."""

    def route(connection: socket.socket) -> None:
        for index in range(len(data)):
            connection.sendall(data[index : index + 1])
            time.sleep(pause_s)

    return route


def endless(head: bytes, piece: bytes) -> Route:
    """Return a route that sends a head, and then pieces until the client disconnects."""

    def route(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    return route


@contextmanager
def run_web_server(
    routes: Mapping[str, bytes | Route], tls: ssl.SSLContext | None = None, host: str = ""
) -> Iterator[WebServer]:
    """Run a web server until the block ends."""
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
        with suppress(OSError):  # the listener is closed
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


class FakeDNS:
    """Replaces `socket.getaddrinfo`.

    Attributes:
        addresses: by name, the addresses of each lookup; the last ones are repeated. Other names are looked up.
        lookups: the names of `addresses` that were looked up.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: dict[str, list[list[str]]] = {}
        self.lookups: list[str] = []
        self._getaddrinfo = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._resolve)

    def _resolve(self, host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in self.addresses:
            return self._getaddrinfo(host, port, *args, **options)
        self.lookups.append(name)
        lookups = self.addresses[name]
        addresses = lookups.pop(0) if len(lookups) > 1 else lookups[0]
        kinds = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in addresses]
        return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for kind, address in kinds]
