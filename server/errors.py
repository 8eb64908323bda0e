"""Errors as HTTP answers: OpenAI's error body, 4xx for what the client did, 5xx for what the server did."""

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import JSONResponse

from mmlora.errors import AdapterNotFound, EngineDeadError, MMLoRAError, RequestError, ResolverError

KINDS: Final = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class UTF8JSONResponse(JSONResponse):
    """JSON response in which `?` replaces characters that UTF-8 cannot encode.

    Directory names that are not UTF-8 hold such characters; one of them must not make a whole list fail.
    """

    def render(self, content: object) -> bytes:
        """Encode the content."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


class Refusal(MMLoRAError):
    """A refusal that has a status of its own, and headers where that calls for them."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


def status_of(error: Exception) -> int:
    """The HTTP status of an error."""
    if isinstance(error, Refusal):
        return error.status
    if isinstance(error, AdapterNotFound):
        return 404
    if isinstance(error, RequestError):
        return 400
    return 503 if isinstance(error, EngineDeadError | ResolverError) else 500


def error_body(error: Exception) -> dict[str, Any]:
    """Describe an error the way OpenAI does.

    What the client can mend, and refusals, tell their message; any other is an internal error and says no more.
    """
    status = status_of(error)
    is_told = status != 500 or isinstance(error, Refusal)
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "internal_server_error")
    return {
        "error": {
            "message": str(error) if is_told else "internal server error",
            "type": kind,
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None) or _code(error),
        }
    }


def error_response(error: Exception, headers: Mapping[str, str] | None = None) -> UTF8JSONResponse:
    """Answer with an error."""
    headers = headers if headers is not None else getattr(error, "headers", None)
    return UTF8JSONResponse(error_body(error), status_code=status_of(error), headers=headers)


def _code(error: Exception) -> str | None:
    """`MediaError` → `media_error`, so that a client can tell faults apart without reading prose."""
    if status_of(error) == 500 or isinstance(error, Refusal):
        return None
    name = "RequestError" if type(error).__name__ == "FieldError" else type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
