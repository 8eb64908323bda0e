"""Checks of the web page that a request comes from, against cross-site request forgery (CSRF) and DNS rebinding.

A browser lets every page send requests to any server that its user can reach; CORS only hides the responses.
`OriginCheck` refuses requests of pages of other origins. `HostCheck` refuses those of a page whose own host name
resolves to this server, which a browser considers same-origin. Other clients send neither header and are not affected.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mmlora.server.errors import Refusal, error_response
from mmlora.utils.text import shorten

OWN_SITE: Final = ("same-origin", "none")  # values of `Sec-Fetch-Site`; none: typed by the user, or a bookmark
DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_HOST: Final = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")  # a `Host` header: a name or address, and a port


class OriginCheck:
    """ASGI middleware that refuses requests of pages whose origin is neither the server's own nor allowed.

    `Sec-Fetch-Site` decides where browsers send it (to https and loopback addresses), because a proxy cannot make it
    wrong by changing `Host`; elsewhere `Origin` is compared with `Host`. Requests with neither header are admitted, and
    so are links to the server.

    Args:
        origins: allowed origins; `*` allows all.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_allowed(scope):
            return await self._app(scope, receive, send)
        origin = Headers(scope=scope).get("origin")
        sender = "another site" if origin is None else f"the origin {shorten(origin)}"
        message = f"requests of web pages of {sender} are not allowed; --allowed-origins adds allowed origins"
        await error_response(Refusal(403, message, code="origin_not_allowed"))(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        origins, site = headers.getlist("origin"), headers.get("sec-fetch-site")
        if "*" in self._origins or (origins and all(origin in self._origins for origin in origins)):
            return True
        if site is not None:
            return site in OWN_SITE or is_link(scope["method"], headers)
        return all(is_own_origin(origin, scope["scheme"], headers.get("host", "")) for origin in origins)


@dataclass(frozen=True)
class AllowedHosts:
    """Host names and addresses by which clients may address a server.

    Args:
        names: names or addresses; `*.llm.example` allows all subdomains, `*` everything.
        is_local: whether the server listens on a loopback address. Then `localhost` and loopback addresses are allowed,
            too; otherwise all IP addresses are, which cannot be rebound and which health probes use.
    """

    names: Sequence[str]
    is_local: bool

    def __contains__(self, host: str) -> bool:
        if any(fits_host(host, name) for name in self.names):
            return True
        try:
            return ip_address(host).is_loopback or not self.is_local
        except ValueError:
            return self.is_local and host == "localhost"


class HostCheck:
    """ASGI middleware that refuses requests whose `Host` header is not allowed, against DNS rebinding.

    A request without `Host` (HTTP/1.0) does not come from a browser and is admitted.

    Args:
        hosts: the allowed hosts.
    """

    def __init__(self, app: ASGIApp, hosts: AllowedHosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        for header in Headers(scope=scope).getlist("host"):
            host = host_name(header)
            if host not in self._hosts:
                message = f"the host name {shorten(host)} is not allowed; --allowed-hosts adds allowed names"
                return await error_response(Refusal(421, message, code="host_not_allowed"))(scope, receive, send)
        await self._app(scope, receive, send)


def host_name(header: str) -> str:
    """Return the host of a `Host` header without port, in lower case; the whole header if it is malformed."""
    match = _HOST.fullmatch(header.strip())
    return (match[1].strip("[]") if match else header).lower().removesuffix(".")


def fits_host(host: str, pattern: str) -> bool:
    """Return whether a host fits a pattern of `--allowed-hosts`."""
    pattern = host_name(pattern) if pattern.startswith("[") else pattern.lower().removesuffix(".")
    return pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def is_own_origin(origin: str, scheme: str, host: str) -> bool:
    """Return whether an origin is that of the server.

    Args:
        origin: `Origin` header.
        scheme: of the request; a proxy in front of the server may add https.
        host: `Host` header.
    """
    try:
        page, own = urlsplit(origin), urlsplit(f"//{host}")
        default = DEFAULT_PORTS[page.scheme]
        is_same = (page.hostname, page.port or default) == (own.hostname, own.port or default)
    except (KeyError, ValueError):  # such as `null`, or a port that is not a number
        return False
    return is_same and bool(own.hostname) and page.scheme in (scheme, "https")


def is_link(method: str, headers: Headers) -> bool:
    """Return whether a browser opens a URL in a tab, which changes nothing and which no other page can read."""
    fetch = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return method == "GET" and fetch == ("navigate", "document")
