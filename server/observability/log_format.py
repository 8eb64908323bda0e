"""Log format of the server: text, or one JSON object per line."""

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
    """Formats a record as a JSON object: time, level, logger, message, request id, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        records = OPEN_RECORDS.get()  # handlers run in the context that logs the record
        if records:
            line["request_id"] = records[0].request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record as one line, followed by prompts and media hashes if these are logged."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        requests = getattr(record, "fields", {}).get("requests")
        line = super().format(record)
        return f"{line} requests={json.dumps(requests)}" if requests else line


def configure_logging(log_format: str, level: str) -> None:
    """Log to standard error, unless the root logger has handlers already (an embedding application set them).

    Args:
        log_format: `text` or `json`.
        level: uvicorn's name of the log level of uvicorn and the access log; all other loggers log warnings.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if log_format == "json" else TextFormatter(TEXT_FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # its warnings repeat the errors that clients get
    # "trace" is uvicorn's name of level 5.
    logging.getLogger(ACCESS_LOGGER).setLevel({"trace": 5}.get(level) or level.upper())
    logging.getLogger(STARTUP_LOGGER).setLevel(logging.INFO)
    if log_format == "text" and sys.stderr.isatty():
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of huggingface_hub, too
    if log_format == "text":
        return
    # Redirect to the log what libraries write to standard error.
    logging.captureWarnings(True)
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
