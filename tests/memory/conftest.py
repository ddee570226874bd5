"""Fixtures of the memory tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memory.database import Database
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder


@pytest.fixture
def encoder() -> HashingEncoder:
    return HashingEncoder()


@pytest.fixture
def memory(tmp_path: Path, encoder: HashingEncoder) -> Iterator[Memory]:
    with Memory.open(tmp_path / "data", PATIENT, encoder=encoder) as memory:
        yield memory


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "ratchet.db")
    yield database
    database.close()
