"""Authentication: API keys, the caller they identify, and the origins that browsers may send requests from."""

import hashlib
import hmac
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from mmlora.server.errors import Refusal, error_response

# `/` and `/playground/` are the playground page and its files; the page asks the user for the key.
PUBLIC_PATHS: Final = frozenset({"/", "/health", "/ready"})
PUBLIC_FOLDER: Final = "/playground/"
EXPOSED_HEADERS: Final = ("retry-after", "x-mmlora-adapter", "x-mmlora-reason", "x-request-id")

# Digest of the `Authorization` headers. Media uuids are scoped to it: clients with different keys share no media.
CALLER: Final[ContextVar[str]] = ContextVar("CALLER", default="")


class Authentication:
    """ASGI middleware that sets `CALLER` and refuses requests without a valid API key.

    Public paths need no key.

    Args:
        keys: the valid API keys; None admits every request.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str] | None = None) -> None:
        self._app = app
        self._is_open = keys is None
        # An environment variable may contain bytes that are not UTF-8.
        self._digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys or ()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        tokens = "\n".join(headers.getlist("authorization")).encode("latin-1")
        CALLER.set(hashlib.sha256(tokens).hexdigest())
        if self._is_open or is_public(route_path(scope)) or self._has_valid_key(headers):
            return await self._app(scope, receive, send)
        message = "a valid API key is required: 'Authorization: Bearer <key>'"
        refusal = Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        await error_response(refusal)(scope, receive, send)

    def _has_valid_key(self, headers: Headers) -> bool:
        kind, _, token = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("latin-1")).digest()
        # Compare with every key, each in constant time, so that timing reveals nothing about any key.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return kind.lower() == "bearer" and any(matches)


@dataclass(frozen=True)
class CORS:
    """Cross-origin policy of a server; without one, browsers block requests from pages of other origins.

    Args:
        origins: allowed origins such as `https://chat.example`; `*` allows all.
        methods, headers: allowed request methods and headers; `*` allows all.
        allow_credentials: let browsers send cookies.
    """

    origins: Sequence[str]
    methods: Sequence[str] = ("*",)
    headers: Sequence[str] = ("*",)
    allow_credentials: bool = False

    def add_to(self, app: FastAPI) -> None:
        """Add the CORS middleware; preflight requests need no API key, since browsers send none with them."""
        app.add_middleware(
            CORSMiddleware,
            allow_origins=self.origins,
            allow_methods=self.methods,
            allow_headers=self.headers,
            allow_credentials=self.allow_credentials,
            expose_headers=EXPOSED_HEADERS,
        )


def is_public(path: str) -> bool:
    """Return whether a path needs no API key."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER)


def route_path(scope: Scope) -> str:
    """Return the path of a request without the prefix of a reverse proxy."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
