"""What the server writes to stderr: lines for people, or JSON for collectors, with the request's id
and key where a line is about one."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

current_request: ContextVar[str] = ContextVar("current_request", default="")
current_key: ContextVar[str] = ContextVar("current_key", default="")


class TextFormatter(logging.Formatter):
    """`2027-01-31 12:00:00,000 INFO message [request key]`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        about = " ".join(filter(None, (current_request.get(), current_key.get())))
        return super().formatMessage(record) + (f" [{about}]" if about else "")


class JsonFormatter(logging.Formatter):
    """One object per line, whatever a message holds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": current_request.get() or None,
            "key": current_key.get() or None,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value is not None})


def configure(log_format: LogFormat) -> None:
    """Send the whole process's log to stderr in this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def adopt_transformers() -> None:
    """Put what transformers prints into our log, and let it draw no progress bars."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs.disable_default_handler()
    theirs.enable_propagation()
    logging.captureWarnings(True)
