"""The socket that a server listens on, its TLS, and how many files it may have open."""

import logging
import os
import resource
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from mmlora.errors import ConfigError
from mmlora.server.args import ServerArgs

logger = logging.getLogger(__name__)
NUM_OTHER_FILES: Final = 256  # weights, adapters, the log, and what libraries keep open
ENCRYPTED: Final = "the key is encrypted; only keys without a passphrase can be used"


def address_of(listener: socket.socket, *, is_tls: bool, root_path: str = "") -> str:
    """The URL of a server that listens on a socket, or `unix:PATH`."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if is_tls else 'http'}://{host}:{port}{root_path}"


class RootPath:
    """ASGI middleware that accepts requests with and without the prefix of a reverse proxy: some proxies strip it.

    Args:
        app: the application.
        root_path: the prefix; starts with a slash and does not end with one.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            root, path = self._root_path, scope["path"]
            scope = {**scope, "root_path": root, "path": path if path.startswith(f"{root}/") else root + path}
        await self._app(scope, receive, send)


@contextmanager
def listening(host: str, port: int, uds: str | None) -> Iterator[socket.socket]:
    """Listen while the context lasts, on a port, or on a Unix socket that is removed afterwards.

    Args:
        host, port: of a TCP socket; port 0 takes a free one.
        uds: path of a Unix socket, in place of it.

    Raises:
        ConfigError: the address is taken or cannot be had.
    """
    listener = listen_tcp(host, port) if uds is None else listen_unix(uds)
    inode = os.stat(uds).st_ino if uds is not None else None
    try:
        yield listener
    finally:
        listener.close()
        with suppress(OSError):
            if uds is not None and os.stat(uds).st_ino == inode:  # and not another server's by now
                os.unlink(uds)


def listen_tcp(host: str, port: int) -> socket.socket:
    """Claim a port.

    Raises:
        ConfigError: it is taken, or there is no such host.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
        raise ConfigError(f"host={host!r}: {getattr(error, 'strerror', None) or error}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()  # two sockets may be bound to a port, but only one listens
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener


def listen_unix(path: str) -> socket.socket:
    """Claim the path of a Unix socket; the umask of the process decides who may connect.

    Raises:
        ConfigError: something else is there, or somebody listens already.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(f"uds={path!r}: cannot listen there: {error.strerror or error}") from None
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket that a server left that was killed.

    Raises:
        ConfigError: it is no socket, or somebody listens.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"uds={path!r}: there is something that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ConfigError(f"uds={path!r}: another process listens there")


def tls_of(args: ServerArgs) -> ssl.SSLContext | None:
    """Make what TLS connections need; None where no certificate is given.

    Raises:
        ConfigError: a file cannot be used.
    """
    if args.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password=_refuse_encrypted)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        key = f", ssl_keyfile={args.ssl_keyfile!r}" if args.ssl_keyfile else ""
        raise ConfigError(f"ssl_certfile={args.ssl_certfile!r}{key}: {_reason(error)}") from None
    try:
        if args.ssl_ca_certs is not None:
            context.load_verify_locations(args.ssl_ca_certs)
        context.verify_mode = ssl.VerifyMode(args.ssl_cert_reqs)
    except (OSError, ValueError) as error:
        raise ConfigError(f"ssl_ca_certs={args.ssl_ca_certs!r}: {_reason(error)}") from None
    return context


def _refuse_encrypted() -> str:
    raise ValueError(ENCRYPTED)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"no usable PEM file ({error.reason or error})"
    return getattr(error, "strerror", None) or str(error)


def raise_file_limit(max_connections: int) -> None:
    """Have the process open as many files as connections need, as far as the system lets it."""
    wanted = max_connections + NUM_OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning("max_connections=%d needs %d open files; the system allows %d", max_connections, wanted, hard)
