"""The data directory: one owner even if its files are deleted, private to its user, no silent loss."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from memory.errors import DataDirectoryInUse, StorageError
from memory.schema import Document
from memory.storage.ownership import take_ownership
from memory.store import Memory, open_keys
from tests.faults.support.children import Child, Tell
from tests.memory.episodes import PATIENT, HashingEncoder


def open_memory(data_dir: Path) -> Memory:
    return Memory.open(data_dir, PATIENT, encoder=HashingEncoder())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_and_wait(tell: Tell, data_dir: Path) -> None:
    """Store a document, then wait to be killed."""
    import asyncio
    import time

    with open_memory(data_dir) as memory:
        row = asyncio.run(memory.documents.ingest("kept", "a text"))
        tell(row.id)
        time.sleep(60)


def kill_after_writing(data_dir: Path) -> str:
    """Kill a process after it has written a document; return the document's id."""
    child = Child(write_and_wait, data_dir)
    child.listen(until=lambda: bool(child.told))
    child.kill()
    return child.told[0][0]


def titles_in(data_dir: Path) -> list[str]:
    with open_memory(data_dir) as memory:
        rows: list[Document] = memory.documents.select()
        return [row.title for row in rows]


def test_a_lock_file_that_is_deleted_lets_no_second_owner_in(tmp_path: Path) -> None:
    owner = take_ownership(tmp_path)
    (tmp_path / "owner.lock").unlink()
    with pytest.raises(DataDirectoryInUse, match="in use by another process"):
        take_ownership(tmp_path)
    owner.close()
    take_ownership(tmp_path).close()


def test_a_second_process_learns_where_the_owner_answers(tmp_path: Path) -> None:
    owner = take_ownership(tmp_path)
    owner.set_address("http://127.0.0.1:8080")
    with pytest.raises(DataDirectoryInUse, match=f"process {os.getpid()} since .* at http://127.0.0.1:8080") as refused:
        take_ownership(tmp_path)
    assert refused.value.url == "http://127.0.0.1:8080"
    owner.close()


def test_nobody_else_may_read_what_is_kept(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    before = os.umask(0o022)
    try:
        with open_memory(data_dir):
            found = {path: mode_of(path) for path in data_dir.rglob("*")}
    finally:
        os.umask(before)
    assert mode_of(data_dir) == 0o700
    assert {"ratchet.db", "ratchet.db-wal", "owner.lock"} <= {path.name for path in found}
    assert {path.name: oct(mode) for path, mode in found.items() if mode & 0o077} == {}


def test_a_directory_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    with open_memory(tmp_path):
        pass
    tmp_path.chmod(0o755)
    (tmp_path / "ratchet.db").chmod(0o644)
    (tmp_path / "linked").symlink_to("/etc/hostname")
    before = mode_of(Path("/etc/hostname"))
    take_ownership(tmp_path).close()
    assert (mode_of(tmp_path), mode_of(tmp_path / "ratchet.db")) == (0o700, 0o600)
    assert mode_of(Path("/etc/hostname")) == before


def test_a_directory_that_all_share_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    take_ownership(tmp_path).close()
    assert mode_of(tmp_path) == 0o1777
    assert mode_of(tmp_path / "owner.lock") == 0o600


@pytest.mark.parametrize("loss", ["emptied", "deleted"])
def test_a_lost_database_is_not_replaced_by_an_empty_one(tmp_path: Path, loss: str) -> None:
    with open_memory(tmp_path):
        pass
    database = tmp_path / "ratchet.db"
    database.write_bytes(b"") if loss == "emptied" else database.unlink()
    for open_one in (open_memory, lambda data_dir: open_keys(data_dir).__enter__()):
        with pytest.raises(StorageError, match=r"is (empty|missing), but this directory has had one: restore a backup"):
            open_one(tmp_path)
    (tmp_path / "ratchet.db.state").unlink()
    assert titles_in(tmp_path) == []


def test_a_database_of_zeros_is_refused(tmp_path: Path) -> None:
    with open_memory(tmp_path):
        pass
    database = tmp_path / "ratchet.db"
    database.write_bytes(bytes(database.stat().st_size))
    with pytest.raises(StorageError, match="restore a backup"):
        open_memory(tmp_path)


def test_what_a_killed_process_wrote_is_there_again(tmp_path: Path) -> None:
    kill_after_writing(tmp_path)
    assert titles_in(tmp_path) == ["kept"]
    assert titles_in(tmp_path) == ["kept"]  # after an orderly end no log is expected


def test_a_log_that_was_deleted_after_a_kill_is_missed(tmp_path: Path) -> None:
    kill_after_writing(tmp_path)
    (tmp_path / "ratchet.db-wal").unlink()
    with pytest.raises(StorageError, match=r"ratchet\.db-wal' is missing: the last process was killed"):
        open_memory(tmp_path)
    (tmp_path / "ratchet.db.state").unlink()
    assert titles_in(tmp_path) == []  # lost, as the error had said
