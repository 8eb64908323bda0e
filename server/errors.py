"""Errors as HTTP responses in OpenAI's form: 4xx for faults of the client, 5xx for faults of the server."""

from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

from mmlora.errors import AdapterNotFound, EngineDeadError, MMLoRAError, RequestError, ResolverError
from mmlora.server.bodies import UTF8JSONResponse

ERROR_TYPES: Final = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Refusal(MMLoRAError):
    """Error with an explicit status, whose message clients see, and headers where the status calls for them."""

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
    """Return the HTTP status of an error."""
    if isinstance(error, Refusal):
        return error.status
    if isinstance(error, AdapterNotFound):
        return 404
    if isinstance(error, RequestError):
        return 400
    return 503 if isinstance(error, EngineDeadError | ResolverError) else 500


def error_body(error: Exception) -> dict[str, Any]:
    """Return OpenAI's description of an error.

    Clients see the message of a `Refusal` and of errors whose status is not 500; others become a generic message, so
    that internals do not leak.
    """
    status = status_of(error)
    is_public = status != 500 or isinstance(error, Refusal)
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "internal_server_error")
    return {
        "error": {
            "message": str(error) if is_public else "internal server error",
            "type": kind,
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None) or _code(error),
        }
    }


def error_response(error: Exception, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response to a request that failed."""
    headers = headers if headers is not None else getattr(error, "headers", None)
    return UTF8JSONResponse(error_body(error), status_code=status_of(error), headers=headers)


def _code(error: Exception) -> str | None:
    """Return a code that clients can compare, such as `media_error` for `MediaError`."""
    if status_of(error) == 500 or isinstance(error, Refusal):
        return None
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(error).__name__).lstrip("_")
