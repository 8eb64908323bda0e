"""`APIKeys`: who is let in, on every route but those that anybody may ask."""

import hmac
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mmlora.server.errors import Refusal, error_response
from mmlora.server.http.root_path import route_path

PUBLIC_PATHS: Final = frozenset({"/", "/health", "/ready"})  # `/` is the playground page, which asks for the key
PUBLIC_FOLDER: Final = "/playground/"  # what the page is made of


class APIKeys:
    """Lets requests with one of the keys through, and those of public paths.

    Args:
        app: what is guarded.
        keys: at least one.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        # A variable of the environment may hold bytes that are not UTF-8.
        self._digests = [sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or is_public(route_path(scope)) or self._is_known(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        message = "a valid API key is needed as 'Authorization: Bearer <key>'"
        refusal = Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        await error_response(refusal)(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        kind, _, token = headers.get("authorization", "").partition(" ")
        digest = sha256(token.strip().encode("latin-1")).digest()
        # All of them are compared, each in constant time: how long it takes tells nothing of any key.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return kind.lower() == "bearer" and any(matches)


def is_public(path: str) -> bool:
    """Whether anybody may ask for a path."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER)
