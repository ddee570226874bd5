"""Public data files for tests, which lie outside of the repository: a folder `shared/data` in it or above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def find_shared_file(name: str) -> Path:
    """Return the path of one file; skip the test where the folder is absent."""
    found = next(
        (path for parent in Path(__file__).parents if (path := parent / "shared" / "data" / name).exists()), None
    )
    if found is None:
        pytest.skip(f"shared/data/{name} is not on this machine")
    return found


def read_shared_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of one JSONL file; skip the test where the folder is absent."""
    text = find_shared_file(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]
