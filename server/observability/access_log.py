"""Access log: one line per HTTP request, and request counts by route and status."""

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
    """ASGI middleware that counts, logs and traces requests when their response has ended.

    Args:
        counts: incremented by route and status.
        log_requests: include prompts and media hashes.
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
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, start_s = 500, time.monotonic()  # 500 stays if an exception escapes before the response starts

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        records: list[RequestRecord] = []
        token = OPEN_RECORDS.set(records)
        try:
            await self._app(scope, receive, record_status)
        finally:
            # The route's template, not the path: clients choose paths, and the number of labels must stay bounded.
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self._counts[route, status] += 1
            fields = {**_http_fields(scope, status, time.monotonic() - start_s), **summarize_records(records)}
            if self._log_requests:
                fields["requests"] = [_describe_content(record) for record in records]
            logger.info("%s", format_line(fields), extra={"fields": fields})
            if self._tracer is not None:
                self._tracer.trace(scope, route, fields, start_s, records)
            # Not earlier: on a kept-alive connection, the outer context may hold the records of a previous request.
            OPEN_RECORDS.reset(token)


def summarize_records(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Return the log fields of the engine requests of one HTTP request: totals, without content."""
    if not records:
        return {}
    first = records[0]
    # A request that was not queued by now never ran: its client has disconnected.
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


def format_line(fields: dict[str, Any]) -> str:
    """Format the fields as text: method, path and status first, then the others that are set, without content."""
    rest = [(name, value) for name, value in fields.items() if name not in ("method", "path", "status", "requests")]
    text = " ".join(f"{name}={value}" for name, value in rest if value is not None)
    return printable(f"{fields['method']} {fields['path']} {fields['status']} {text}")


def _http_fields(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    path = quote(scope["path"], safe="/:@+,", errors="replace")[:MAX_LOGGED_PATH_CHARS]
    return {"method": scope["method"][:16], "path": path, "status": status, "seconds": round(seconds, 4)}


def _describe_content(record: RequestRecord) -> dict[str, Any]:
    return {"prompt": record.prompt, "media": [asdict(item) for item in record.media]}
