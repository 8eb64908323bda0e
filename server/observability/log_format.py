"""The log of a server: lines of text, or one JSON object per line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final

from mmlora.engine.metrics import OPEN_RECORDS
from mmlora.server.observability.access_log import ACCESS_LOGGER

STARTUP_LOGGER: Final = "mmlora.startup"
TEXT_FORMAT: Final = "%(levelname)s %(name)s: %(message)s"


class JSONFormatter(logging.Formatter):
    """Writes a record as a JSON object: time, level, logger, message, the request it belongs to, and its own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        records = OPEN_RECORDS.get()  # handlers run where the record was made
        if records:
            line["request_id"] = records[0].request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Writes a record as one line, and what was asked after it where that is wanted."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        requests = getattr(record, "fields", {}).get("requests")
        line = super().format(record)
        return f"{line} requests={json.dumps(requests)}" if requests else line


def configure_logging(log_format: str, level: str) -> None:
    """Send the log of this process to standard error, unless whoever embeds the server has set handlers.

    Args:
        log_format: `text` or `json`.
        level: of uvicorn and the access lines, as uvicorn calls it; everything else is logged from warnings on.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if log_format == "json" else TextFormatter(TEXT_FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of what the client is told
    # uvicorn calls 5 "trace".
    logging.getLogger(ACCESS_LOGGER).setLevel({"trace": 5}.get(level) or level.upper())
    logging.getLogger(STARTUP_LOGGER).setLevel(logging.INFO)
    if log_format == "json" or not sys.stderr.isatty():
        _draw_no_progress_bars()
    if log_format == "json":
        logging.captureWarnings(True)
        _quieten_libraries()


def _draw_no_progress_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of huggingface_hub, too


def _quieten_libraries() -> None:
    """Have libraries that write to standard error by themselves use the log."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
