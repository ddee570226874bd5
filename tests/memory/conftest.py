"""Fixtures of the memory tests. Tests of the database run on SQLite, and again on PostgreSQL where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memory.config import MemoryConfig
from memory.storage.database import Database
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder
from tests.support.postgresql import HOMES, Cluster, Databases, start_cluster


@pytest.fixture
def encoder() -> HashingEncoder:
    return HashingEncoder()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    yield from start_cluster()


@pytest.fixture(scope="session")
def databases(cluster: Cluster) -> Databases:
    return Databases(cluster)


@pytest.fixture
def postgresql(databases: Databases) -> Iterator[str]:
    """The URL of a database with empty tables."""
    with databases.lend() as url:
        yield url


@pytest.fixture(params=HOMES)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """The path or URL of the database."""
    return tmp_path / "ratchet.db" if request.param == "sqlite" else request.getfixturevalue("postgresql")


@pytest.fixture
def config(location: Path | str) -> MemoryConfig:
    return PATIENT.model_copy(update={"database": location if isinstance(location, str) else None})


@pytest.fixture
def memory(tmp_path: Path, config: MemoryConfig, encoder: HashingEncoder) -> Iterator[Memory]:
    with Memory.open(tmp_path / "data", config, encoder=encoder) as memory:
        yield memory


@pytest.fixture
def database(location: Path | str) -> Iterator[Database]:
    database = Database(location)
    yield database
    database.close()
