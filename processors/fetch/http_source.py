"""`HTTPSource`: downloads of `http:` and `https:` URLs that clients choose, limited in target, size and time.

It uses httpcore, the base of httpx, directly: no cookies, proxies, environment variables or decompression.
"""

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from typing import Final

import httpcore
import httpx

from mmlora.errors import MediaError
from mmlora.processors.fetch.checked_network import CheckedNetwork, Network
from mmlora.processors.media.items import MediaLimits
from mmlora.utils.text import shorten

MAX_HTTP_URL_CHARS: Final = 8192
MAX_AT_ONCE: Final = 8  # downloads of one prompt
MAX_OPEN: Final = 256  # downloads of all prompts
MAX_LOOKUPS: Final = 32  # concurrent DNS lookups; each takes a thread
MAX_REDIRECTS: Final = 5
MAX_SILENCE_S: Final = 5.0  # to connect, and between two chunks of a response
REDIRECTS: Final = (301, 302, 303, 307, 308)
# Other ports below 1024 belong to services such as SSH, SMTP and LDAP, some of which execute lines of a request.
WEB_PORTS: Final = (80, 443)
FREE_PORTS: Final = range(1024, 65536)

_FETCH_ERRORS = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, ssl.SSLError, OSError)
_loop_lock: Final = threading.Lock()
_loops: Final[list[asyncio.AbstractEventLoop]] = []


class HTTPSource:
    """Downloads URLs on the event loop of `_fetch_loop`.

    Args:
        domains: allowed hosts, `example.org`, or `*.example.org` for all its subdomains; None allows all.
        networks: allowed addresses besides public ones.
        timeout_s: of one URL, redirects included.
        limits: of the media.
    """

    def __init__(
        self, domains: Sequence[str] | None, networks: Sequence[Network], timeout_s: float, limits: MediaLimits
    ) -> None:
        self._domains = None if domains is None else [_plain(domain) for domain in domains]
        self._network = CheckedNetwork(networks)
        self._timeout_s = timeout_s
        self._limits = limits
        self._open = asyncio.Semaphore(MAX_OPEN)

    def read(self, urls: Collection[str]) -> "Future[dict[str, bytes]]":
        """Start to download the URLs of one prompt; cancelling the future stops it.

        Returns:
            A future of the contents by URL, or of a `MediaError`: a URL is not allowed, cannot be read or is too large.
        """
        return asyncio.run_coroutine_threadsafe(self._read_all(urls), _fetch_loop())

    async def _read_all(self, urls: Collection[str]) -> dict[str, bytes]:
        at_once = asyncio.Semaphore(MAX_AT_ONCE)
        contents: dict[str, bytes] = {}

        async def read(url: str) -> None:
            async with at_once, self._open:
                contents[url] = await self._read(url)
            num_bytes, allowed = sum(map(len, contents.values())), self._limits.max_decoded_bytes
            if num_bytes > allowed:
                raise MediaError(f"the media of the prompt have {num_bytes} bytes or more; the limit is {allowed}")

        tasks = [asyncio.ensure_future(read(url)) for url in urls]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return contents

    async def _read(self, url: str) -> bytes:
        shown = shorten(url)
        target = self._check(url, shown)
        try:
            async with asyncio.timeout(self._timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    async with self._get(target) as response:
                        if response.status not in REDIRECTS:
                            return await self._read_body(response, shown)
                        location = _header(response, b"location")
                    target = self._check(_join(target, location, shown), shown)
        except TimeoutError:
            raise MediaError(f"media URL {shown} was not read within {self._timeout_s:g} s") from None
        except _FETCH_ERRORS as error:
            raise MediaError(f"media URL {shown} cannot be read: {type(error).__name__}: {error}") from None
        raise MediaError(f"media URL {shown} is redirected more than {MAX_REDIRECTS} times")

    def _check(self, url: str, shown: str) -> httpx.URL:
        """Parse a URL and check everything but the addresses of its host, which `CheckedNetwork` checks.

        Raises:
            MediaError: it is malformed or not allowed; user names and passwords in it are not repeated.
        """
        if len(url) > MAX_HTTP_URL_CHARS:
            raise MediaError(f"media URL of {len(url)} characters; the limit is {MAX_HTTP_URL_CHARS}")
        try:
            target = httpx.URL(url)
            host, *others = _spellings(target)
        except UnicodeError:
            raise MediaError("malformed media URL: it has characters that a URL cannot have") from None
        except (httpx.InvalidURL, ValueError) as error:
            raise MediaError(f"malformed media URL: {shorten(error, str, 160)}") from None
        if target.userinfo:
            raise MediaError(f"media URL for the host {shorten(host)} contains a user name or password; remove it")
        if target.scheme not in ("http", "https") or not host:
            raise MediaError(f"media URL {shown} leads to {shorten(url)}; it must be an http(s) URL")
        if target.port is not None and target.port not in (*WEB_PORTS, *FREE_PORTS):
            allowed = f"{', '.join(map(str, WEB_PORTS))} and {FREE_PORTS[0]} to {FREE_PORTS[-1]}"
            raise MediaError(f"media URL with port {target.port}; allowed are {allowed}")
        if not self._is_allowed(_plain(host), *map(_plain, others)):
            allowed = ", ".join(self._domains or ()) or "none"
            raise MediaError(f"media URL with host {shorten(host)}; --allowed-media-domains allows {allowed}")
        return target

    def _is_allowed(self, *hosts: str) -> bool:
        """Return whether one of the spellings of a host is allowed."""
        if self._domains is None:
            return True
        return any(
            host == domain or (domain.startswith("*.") and host.endswith(domain[1:]))
            for host in hosts
            for domain in self._domains
        )

    @asynccontextmanager
    async def _get(self, target: httpx.URL) -> AsyncIterator[httpcore.Response]:
        """Request a URL over a new connection."""
        url = httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        headers: list[tuple[bytes | str, bytes | str]] = [
            ("Host", target.netloc),
            ("User-Agent", "mmlora"),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),  # against decompression bombs
            ("Connection", "close"),
        ]
        silence_s = min(MAX_SILENCE_S, self._timeout_s)
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), silence_s)
        pool = httpcore.AsyncConnectionPool(
            self._ssl_context, max_keepalive_connections=0, network_backend=self._network
        )
        async with pool, pool.stream("GET", url, headers=headers, extensions={"timeout": timeouts}) as response:
            yield response

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        return httpcore.default_ssl_context()

    async def _read_body(self, response: httpcore.Response, shown: str) -> bytes:
        if response.status != 200:
            raise MediaError(f"media URL {shown} was answered with status {response.status}")
        encoding = _header(response, b"content-encoding").lower()
        if encoding not in ("", "identity"):
            raise MediaError(f"media URL {shown} is sent in the encoding {shorten(encoding)}; only identity is allowed")
        allowed = self._limits.max_bytes
        claim = _header(response, b"content-length")
        if claim.isdecimal() and int(claim) > allowed:
            raise MediaError(f"media URL {shown} claims {claim} bytes, more than the allowed {allowed} bytes")
        chunks, num_bytes = [], 0
        async for chunk in response.aiter_stream():
            num_bytes += len(chunk)
            if num_bytes > allowed:
                raise MediaError(f"media URL {shown} has more than the allowed {allowed} bytes")
            chunks.append(chunk)
        return b"".join(chunks)


def _fetch_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all downloads, which runs in a dedicated thread from the first use on.

    Slow servers block neither the threads of a pool nor the server's event loop, and synchronous callers can wait, too.
    """
    with _loop_lock:
        if not _loops:
            loop = asyncio.new_event_loop()
            loop.set_default_executor(ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="mmlora-names"))
            threading.Thread(target=loop.run_forever, name="mmlora-fetch", daemon=True).start()
            _loops.append(loop)
        return _loops[0]


def _spellings(target: httpx.URL) -> list[str]:
    """Return the host of a URL: as DNS knows it, and in Unicode if it is an international name.

    Raises:
        UnicodeError: it contains characters that no host may contain.
    """
    spellings = [target.raw_host.decode("ascii")]
    with suppress(UnicodeError):  # not valid IDNA 2008, as the names with emojis that DNS has
        spellings.append(target.host)
    return spellings


def _plain(host: str) -> str:
    return host.lower().rstrip(".")


def _header(response: httpcore.Response, name: bytes) -> str:
    """Return the value of a header, or an empty string."""
    return next((value.decode("latin-1").strip() for key, value in response.headers if key.lower() == name), "")


def _join(target: httpx.URL, location: str, shown: str) -> str:
    """Return the target of a redirect.

    Raises:
        MediaError: it has no valid target.
    """
    try:
        if location:
            return str(target.join(location))
    except (httpx.InvalidURL, ValueError):
        pass
    raise MediaError(f"media URL {shown} is redirected to {shorten(location)}, which is not a URL")
