"""`X-Request-Id`: names a request in its response and its ids, so that clients and proxies can find it in logs."""

import re
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = "x-request-id"
CLIENT_ID: Final = r"^[A-Za-z0-9._:/+=@-]{1,128}$"  # it is written to logs, headers and response ids
_CLIENT_ID: Final = re.compile(CLIENT_ID.replace("$", r"\Z"))


class RequestId:
    """ASGI middleware that returns the client's `X-Request-Id` in the response, or a new one.

    The id is in `request.state.request_id`. A client's id that is too long or has other characters is replaced.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = _client_id(scope) or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def response_ids(request: Request, prefix: str, body_id: str | None = None) -> tuple[str, str]:
    """Return the id of a response, and one for the engine that is unique even if clients repeat their ids.

    Args:
        request: its header wins over `body_id`.
        prefix: of both ids, such as `chatcmpl-`.
        body_id: `request_id` of the body.
    """
    client_id = _client_id(request.scope) or body_id
    response_id = f"{prefix}{client_id or request.state.request_id}"
    return response_id, f"{response_id}-{uuid.uuid4().hex[:8]}" if client_id is not None else response_id


def _client_id(scope: Scope) -> str | None:
    given = Headers(scope=scope).get(HEADER, "")
    return given if _CLIENT_ID.match(given) else None
