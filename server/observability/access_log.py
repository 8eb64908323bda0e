"""`AccessLog`: a line for each HTTP request, and how many there were by route and status."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmlora.engine.metrics import OPEN_RECORDS, RequestRecord
from mmlora.server.observability.tracing import Tracer
from mmlora.utils.text import printable

ACCESS_LOGGER: Final = "mmlora.access"
NO_ROUTE: Final = "other"
MAX_LOGGED_PATH_CHARS: Final = 200
HttpCounts = Counter[tuple[str, int]]

logger = logging.getLogger(ACCESS_LOGGER)


class AccessLog:
    """Counts and logs the requests of an application, streams until their end.

    Args:
        app: the application.
        counts: by route and status; added to.
        log_requests: prompts and the hashes of media go into the lines, too.
        tracer: traces the requests.
    """

    def __init__(
        self, app: ASGIApp, counts: HttpCounts, *, log_requests: bool = False, tracer: Tracer | None = None
    ) -> None:
        self._app = app
        self._counts = counts
        self._log_requests = log_requests
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, start_s = 500, time.monotonic()  # what a failure before the answer becomes, further out

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        records: list[RequestRecord] = []
        token = OPEN_RECORDS.set(records)
        try:
            await self._app(scope, receive, note_status)
        finally:
            OPEN_RECORDS.reset(token)
            # The template and never the path: clients choose paths, and a label must not grow with them.
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self._counts[route, status] += 1
            fields = {**_http_fields(scope, status, time.monotonic() - start_s), **request_fields(records)}
            if self._log_requests:
                fields["requests"] = [_content(record) for record in records]
            logger.info("%s", as_line(fields), extra={"fields": fields})
            if self._tracer is not None:
                self._tracer.trace(scope, route, fields, start_s, records)


def request_fields(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """What is known of the engine's requests behind one HTTP request, several of them added up; no text."""
    if not records:
        return {}
    first = records[0]
    # Nobody waits any more for an answer that is still on its way when the HTTP request is over.
    queued = [record for record in records if record.queued_s]
    reasons = [reason for record in queued for reason in record.all_finish_reasons]
    choice = {"adapter": first.lora.adapter, "reason": first.lora.reason} if first.lora is not None else {}
    end = {"finish_reason": "+".join(dict.fromkeys(reasons))} if reasons else {}
    return {
        "request_id": first.request_id,
        **choice,
        **end,
        "prompt_tokens": sum(record.num_prompt_tokens for record in records),
        "cached_tokens": sum(record.num_cached_tokens for record in records),
        "output_tokens": sum(record.num_output_tokens for record in records),
    }


def as_line(fields: dict[str, Any]) -> str:
    """The fields as text: method, path and status first, then the rest that is set, without what it was asked."""
    rest = [(name, value) for name, value in fields.items() if name not in ("method", "path", "status", "requests")]
    told = " ".join(f"{name}={value}" for name, value in rest if value is not None)
    return printable(f"{fields['method']} {fields['path']} {fields['status']} {told}")


def _http_fields(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    path = quote(scope["path"], safe="/:@+,", errors="replace")[:MAX_LOGGED_PATH_CHARS]
    return {"method": scope["method"][:16], "path": path, "status": status, "seconds": round(seconds, 4)}


def _content(record: RequestRecord) -> dict[str, Any]:
    return {"prompt": record.prompt, "media": [asdict(item) for item in record.media]}
