"""Configures logging: one JSON object per line in a rotating file, so that the terminal stays free for people.

Libraries that use the standard library's logging write to the same file.
Invariant: no message of an exception is logged with its traceback, because it may quote a user's text.
"""

from __future__ import annotations

import logging
import traceback
from logging.handlers import RotatingFileHandler
from pathlib import Path

import structlog
from structlog.typing import ExcInfo

MAX_BYTES = 10_000_000
NUM_KEPT = 3


def format_without_message(exc_info: ExcInfo) -> str:
    """Return the stack and the class of an exception."""
    kind, _, trace = exc_info
    return f"{''.join(traceback.format_tb(trace))}{kind.__name__}"


def send_logs_to(path: Path) -> None:
    """Write all logs of this process to `path` from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(format_without_message),
    ]
    handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=NUM_KEPT, encoding="utf-8", delay=True)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]  # replaces handlers that libraries have added, which would print to the terminal
    root.setLevel(logging.INFO)
    for name in ("httpx", "alembic", "chromadb", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
