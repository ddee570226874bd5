"""Public data files for tests, not in version control: a folder `shared/data` in the repository or above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def find_shared(name: str) -> Path:
    """Return a file or folder of the shared data; skip the test if it is absent."""
    found = next(
        (path for parent in Path(__file__).parents if (path := parent / "shared" / "data" / name).exists()), None
    )
    if found is None:
        pytest.skip(f"shared/data/{name} is not on this machine")
    return found


def read_shared_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of one JSONL file; skip the test if the folder is absent."""
    text = find_shared(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]
