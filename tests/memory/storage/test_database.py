"""The writer, the readers, and disk failures."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, insert, text
from sqlmodel import Session, select

from memory.errors import StorageError
from memory.records.policies import Policies
from memory.records.trajectories import Trajectories
from memory.schema import Document, Step, StepKind, Trajectory
from memory.storage.database import Database


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Database]:
    """A SQLite file, for tests of SQLite only."""
    database = Database(tmp_path / "ratchet.db")
    yield database
    database.close()


def add_document(title: str, digest: str = "d"):
    def write(session: Session) -> str:
        session.execute(insert(Document).values(Document(id=title, title=title, digest=digest).model_dump()))
        return title

    return write


def titles(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.exec(select(Document.title)))


async def hold_the_writer(database: Database) -> tuple[threading.Event, asyncio.Task]:
    """Keep the writer busy, so that all writes queued meanwhile share the next batch."""
    is_held, release = threading.Event(), threading.Event()
    held = asyncio.ensure_future(database.write(lambda session: is_held.set() or release.wait(10)))
    await asyncio.to_thread(is_held.wait)
    return release, held


async def together(database: Database, *works) -> list:
    return await waiting_together(database, *(database.write(work) for work in works))


async def waiting_together(database: Database, *writes: Awaitable) -> list:
    release, held = await hold_the_writer(database)
    tasks = [asyncio.ensure_future(write) for write in writes]
    await asyncio.sleep(0.05)
    release.set()
    await held
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_awaited_write_is_seen_by_readers_and_by_the_next_process(database: Database, location: Path | str):
    assert await database.write(add_document("a")) == "a"
    assert titles(database) == {"a"}
    engine = create_engine(location if isinstance(location, str) else f"sqlite:///{location}")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT title FROM documents")).all() == [("a",)]
    engine.dispose()


async def test_readers_see_one_moment_and_cannot_write(database: Database):
    await database.write(add_document("a"))
    with database.read() as session:
        assert session.exec(select(Document.title)).all() == ["a"]
        await database.write(add_document("b"))
        assert session.exec(select(Document.title)).all() == ["a"]
    assert titles(database) == {"a", "b"}
    with pytest.raises(StorageError, match=r"readonly|read-only"), database.read() as session:
        session.execute(text("DELETE FROM documents"))


async def test_sqlites_writer_is_durable_and_alone_checkpoints(file: Database):
    pragmas = ("journal_mode", "synchronous", "foreign_keys")

    def ask(session: Session) -> list:
        return [session.execute(text(f"PRAGMA {pragma}")).scalar() for pragma in pragmas]

    assert await file.write(ask) == ["wal", 2, 1]
    with file.read() as session:
        assert session.execute(text("PRAGMA wal_autocheckpoint")).scalar() == 0


async def test_writes_that_wait_share_one_commit(database: Database):
    commits = []
    event.listen(database._writing, "commit", lambda connection: commits.append(1))
    results = await together(database, *(add_document(str(number)) for number in range(50)))
    assert results == [str(number) for number in range(50)]
    assert len(commits) == 2  # the blocking write, and the batch


async def test_a_failing_write_leaves_nothing_and_spares_its_neighbours(database: Database):
    def half_then_fail(session: Session) -> None:
        add_document("half")(session)
        raise KeyError("planted")

    def twice_the_same(session: Session) -> None:
        session.add(Document(id="x", title="twice", digest="1"))
        session.add(Document(id="y", title="twice", digest="2"))

    results = await together(
        database, add_document("a"), half_then_fail, add_document("b"), twice_the_same, add_document("c")
    )
    assert [isinstance(result, Exception) for result in results] == [False, True, False, True, False]
    assert titles(database) == {"a", "b", "c"}


def append(trajectories: Trajectories, trajectory: Trajectory, position: int, **said) -> Awaitable[None]:
    step = Step(trajectory_id=trajectory.id, position=position, kind=StepKind.TOOL, **said)
    return trajectories.append(step, trajectory=trajectory)


async def test_steps_that_wait_are_handed_over_together_and_each_is_there(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    await Policies(database).register_base("pocket")
    trajectories = Trajectories(database)
    opened = [await trajectories.open(Trajectory(id=f"t{n}", episode_id="e", policy=0)) for n in range(20)]
    handed_over, dialect = [], database._dialect
    insert_rows = dialect.insert_rows
    monkeypatch.setattr(dialect, "insert_rows", lambda *given: handed_over.append(len(given[2])) or insert_rows(*given))
    writes = [append(trajectories, trajectory, n, content=f"{n}") for n in range(3) for trajectory in opened]
    await waiting_together(database, *writes)
    assert handed_over == [60]
    for trajectory in opened:
        assert [step.content for step in trajectories.steps(trajectory.id)] == ["0", "1", "2"]


async def test_a_step_that_is_refused_or_cannot_be_stored_spares_those_it_waited_with(database: Database):
    await Policies(database).register_base("pocket")
    trajectories = Trajectories(database)
    opened = [await trajectories.open(Trajectory(id=f"t{n}", episode_id="e", policy=0)) for n in range(4)]
    for position in (0, 1):
        refused, stored, broken, late = await waiting_together(
            database,
            append(trajectories, opened[0], 7),
            append(trajectories, opened[1], position),
            append(trajectories, opened[2], position, prompt_token_ids=[-1] if position else None),
            append(trajectories, opened[3], position),
        )
        assert isinstance(refused, ValueError) and "the next position is 0" in str(refused)
        assert (stored, late) == (None, None) and isinstance(broken, Exception) == bool(position)
    assert [len(trajectories.steps(trajectory.id)) for trajectory in opened] == [0, 2, 1, 2]


async def test_a_value_that_no_column_holds_spares_those_it_waited_with(database: Database):
    await Policies(database).register_base("pocket")
    trajectories = Trajectories(database)
    opened = [await trajectories.open(Trajectory(id=f"t{n}", episode_id="e", policy=0)) for n in range(3)]
    writes = [append(trajectories, each, 0, seconds=10**400 if each.id == "t1" else 0.0) for each in opened]
    assert [isinstance(came, Exception) for came in await waiting_together(database, *writes)] == [False, True, False]


async def test_a_cancelled_wait_does_not_undo_the_write(database: Database):
    release, held = await hold_the_writer(database)
    waiting = asyncio.ensure_future(database.write(add_document("a")))
    await asyncio.sleep(0)
    waiting.cancel()
    release.set()
    await held
    await database.write(add_document("b"))
    assert waiting.cancelled() and titles(database) == {"a", "b"}


async def test_a_full_disk_is_a_typed_error_after_which_all_is_well(file: Database):
    await file.write(add_document("before"))

    def limit(session: Session) -> None:
        num_pages = session.execute(text("PRAGMA page_count")).scalar()
        session.execute(text(f"PRAGMA max_page_count={num_pages + 3}"))

    await file.write(limit)
    with pytest.raises(StorageError, match=r"ratchet\.db.*full; free some disk space"):
        await file.write(add_document("large", digest="x" * 200_000))
    results = await together(file, add_document("a"), add_document("large", digest="x" * 200_000), add_document("b"))
    assert [type(result) for result in results] == [str, StorageError, str]

    await file.write(lambda session: session.execute(text("PRAGMA max_page_count=1000000")).scalar())
    await file.write(add_document("large", digest="x" * 200_000))
    assert titles(file) == {"before", "a", "b", "large"}
    assert file.check() == []


async def test_a_closed_database_refuses_and_what_was_queued_is_there(location: Path | str):
    database = Database(location)
    writes = [asyncio.ensure_future(database.write(add_document(str(number)))) for number in range(20)]
    await asyncio.sleep(0)
    await asyncio.to_thread(database.close)
    await asyncio.gather(*writes)
    with pytest.raises(StorageError, match="is closed"):
        await database.write(add_document("late"))
    with pytest.raises(StorageError, match="is closed"):
        titles(database)
    database.close()
    again = Database(location if isinstance(location, str) else f"sqlite:///{location}")
    assert len(titles(again)) == 20
    again.close()


def test_a_thread_without_a_loop_writes_too(database: Database):
    assert database.write_sync(add_document("a")) == "a"
    with pytest.raises(KeyError):
        database.write_sync(lambda session: {}["missing"])


def test_a_file_that_is_no_database_is_named(tmp_path: Path):
    path = tmp_path / "ratchet.db"
    path.write_bytes(b"not a database at all, only text " * 100)
    with pytest.raises(StorageError, match=r"ratchet\.db.*not a database; restore a backup"):
        Database(path)
    with pytest.raises(StorageError, match="unable to open"):
        Database(tmp_path / "missing" / "ratchet.db")
    with pytest.raises(ValueError, match="unsupported database 'mysql'"):
        Database("mysql://x")


async def test_check_finds_a_row_that_points_nowhere(file: Database, tmp_path: Path):
    assert file.check() == []
    connection = sqlite3.connect(tmp_path / "ratchet.db")
    connection.execute("INSERT INTO passages VALUES ('p', 'nowhere', 0, 'text')")
    connection.commit()
    connection.close()
    assert file.check() == ["passages row 1 has no documents"]
