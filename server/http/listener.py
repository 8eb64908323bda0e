"""Listening sockets, their URL, the prefix of a reverse proxy, and the limit on open files."""

import logging
import os
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from mmlora.errors import ConfigError

logger = logging.getLogger(__name__)
NUM_OTHER_FILES: Final = 256  # files that are not connections: weights, adapters, logs, libraries


def format_url(listener: socket.socket, *, is_tls: bool, root_path: str = "") -> str:
    """Return the URL of a server that listens on a socket, or `unix:PATH`."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if is_tls else 'http'}://{host}:{port}{root_path}"


class RootPath:
    """ASGI middleware that accepts requests with and without the prefix of a reverse proxy: some proxies strip it.

    Args:
        root_path: the prefix; starts with a slash and does not end with one.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            root, path = self._root_path, scope["path"]
            scope = {**scope, "root_path": root, "path": path if path.startswith(f"{root}/") else root + path}
        await self._app(scope, receive, send)


@contextmanager
def listening(host: str, port: int, uds: str | None) -> Iterator[socket.socket]:
    """Listen on a TCP port or a Unix socket within the context; the Unix socket is removed on exit.

    Args:
        host, port: of a TCP socket; port 0 picks a free one.
        uds: path of a Unix socket, in place of host and port.

    Raises:
        ConfigError: the address is taken or not available.
    """
    listener = listen_tcp(host, port) if uds is None else listen_unix(uds)
    inode = os.stat(uds).st_ino if uds is not None else None
    try:
        yield listener
    finally:
        listener.close()
        with suppress(OSError):
            if uds is not None and os.stat(uds).st_ino == inode:  # unless another server has replaced it
                os.unlink(uds)


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen on a TCP port.

    Raises:
        ConfigError: the port is taken, or the host is unknown.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        raise ConfigError(f"host={host!r}: {getattr(error, 'strerror', None) or error}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()  # two sockets may be bound to a port, but only one can listen
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener


def is_loopback(host: str) -> bool:
    """Return whether a host's first address, on which `listen_tcp` listens, is a loopback address."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError):  # `listen_tcp` reports it
        return False
    return ip_address(address).is_loopback


def listen_unix(path: str) -> socket.socket:
    """Listen on a Unix socket; the umask of the process decides who may connect.

    Raises:
        ConfigError: the path exists and is not a socket, or another process listens on it.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(f"uds={path!r}: cannot listen on it: {error.strerror or error}") from None
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket that a killed server left behind.

    Raises:
        ConfigError: the path exists and is not a socket, or another process listens on it.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"uds={path!r}: the path exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ConfigError(f"uds={path!r}: another process listens on it")


def raise_file_limit(max_connections: int) -> None:
    """Raise the process's limit on open files for `max_connections`, up to the system's hard limit."""
    wanted = max_connections + NUM_OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning("max_connections=%d needs %d open files; the system allows %d", max_connections, wanted, hard)
