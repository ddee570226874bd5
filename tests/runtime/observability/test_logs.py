"""The log file: JSON lines without any text of a user."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import structlog

from runtime.observability.logs import send_logs_to


@pytest.fixture
def log(tmp_path: Path) -> Path:
    send_logs_to(tmp_path / "ratchet.log")
    return tmp_path / "ratchet.log"


@pytest.mark.parametrize("logger", ["uvicorn.error", "structlog"])
def test_a_traceback_names_the_class_and_the_lines_and_never_the_message(log: Path, logger: str):
    try:
        int("my IBAN is DE89")
    except ValueError:
        if logger == "structlog":
            structlog.get_logger().exception("it failed")
        else:
            logging.getLogger(logger).exception("it failed")
    (line,) = log.read_text().splitlines()
    written = json.loads(line)
    assert written["event"] == "it failed" and written["level"] == "error"
    assert "test_logs.py" in written["exception"] and written["exception"].endswith("ValueError")
    assert "invalid literal" not in line
