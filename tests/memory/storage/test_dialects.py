"""Paths and URLs of databases: rejected ones, and messages without passwords."""

from __future__ import annotations

from pathlib import Path

import pytest

from memory.errors import StorageError
from memory.storage.database import Database
from memory.storage.dialects import dialect_of, holds_password
from memory.store import copy_to_server
from tests.memory.episodes import PATIENT

SECRET = "s3cret-w0rd"


def test_a_server_that_is_not_there_is_named_without_the_password(tmp_path: Path):
    url = f"postgresql://ratchet:{SECRET}@127.0.0.1:1/rows"
    with pytest.raises(StorageError, match=r"'rows' on '127.0.0.1:1'.*refused.*see that the server is up") as refused:
        Database(url)
    assert SECRET not in str(refused.value) and SECRET not in repr(dialect_of(url).writing)


@pytest.mark.parametrize(
    ("url", "is_one"),
    [
        (f"postgresql://u:{SECRET}@h/d", True),
        (f"postgresql+psycopg://u@h/d?password={SECRET}", True),
        ("postgresql+psycopg://u@h/d", False),
        ("/var/lib/ratchet.db", False),
        (None, False),
    ],
)
def test_a_password_in_a_url_is_seen(url: str | None, is_one: bool):
    assert holds_password(url) is is_one


@pytest.mark.parametrize("url", [f"mysql://u:{SECRET}@h/d", f"postgresql://u:{SECRET}@h:port/d", f"x y://{SECRET}"])
def test_a_url_that_cannot_be_is_refused_without_its_password(url: str):
    with pytest.raises(ValueError, match=r"postgresql\+psycopg://") as refused:
        dialect_of(url)
    assert SECRET not in str(refused.value)


def test_nothing_is_moved_without_a_place_to_go_and_a_file_to_come_from(tmp_path: Path):
    with pytest.raises(ValueError, match=r"memory\.database is not set"):
        copy_to_server(tmp_path, PATIENT)
    with pytest.raises(ValueError, match=r"there is no .*ratchet\.db"):
        copy_to_server(tmp_path, PATIENT.model_copy(update={"database": "postgresql://u@h/d"}))
