"""Behaviour that only a database server has: crashes, restarts, and two processes that share it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlmodel import Session

from memory.errors import CycleInProgress, StorageError
from memory.records.cycles import Cycles
from memory.records.policies import Policies
from memory.records.trajectories import Trajectories
from memory.schema import PolicyStage, Step, StepKind, Trajectory, new_id
from memory.storage import postgresql as home
from memory.storage.database import Database
from memory.store import Memory, copy_to_server
from tests.memory.episodes import PATIENT, HashingEncoder, play
from tests.memory.storage.test_database import add_document, titles
from tests.support.postgresql import Cluster, skip_without_postgresql, start_cluster

ROOT = Path(__file__).parents[3]

skip_without_postgresql()


@pytest.fixture
def other(postgresql: str, database_there: Database) -> Iterator[Database]:
    """A second writer on the same database, in place of another process."""
    database = Database(postgresql)
    yield database
    database.close()


@pytest.fixture
def database_there(postgresql: str) -> Iterator[Database]:
    database = Database(postgresql)
    yield database
    database.close()


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Cluster]:
    """A cluster that the test may stop."""
    yield from start_cluster()


async def live_on(trajectories: Trajectories, kept: list[tuple[str, int]], refusals: list[str], *, until) -> None:
    """Open trajectories and append steps; record which writes were acknowledged and which failed."""
    while not until.is_set():
        try:
            trajectory = await trajectories.open(Trajectory(id=new_id("trj"), episode_id="e", policy=0))
            for position in range(4):
                step = Step(trajectory_id=trajectory.id, position=position, kind=StepKind.MODEL)
                await trajectories.append(step, trajectory=trajectory)
                kept.append((trajectory.id, position))
        except StorageError as error:
            refusals.append(str(error))
            await asyncio.sleep(0.05)


async def test_a_server_that_crashes_loses_nothing_acknowledged_and_is_written_to_again(own_cluster: Cluster):
    name = own_cluster.create_database()
    database = Database(own_cluster.url(name))
    trajectories = Trajectories(database)
    await Policies(database).register_base("pocket")
    kept, refusals, stop = [], [], asyncio.Event()
    living = [asyncio.ensure_future(live_on(trajectories, kept, refusals, until=stop)) for _ in range(8)]
    for _ in range(2):
        enough = len(kept) + 20
        while len(kept) < enough:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(own_cluster.stop, is_crash=True)
        await asyncio.sleep(0.1)
        with pytest.raises(StorageError, match=f"'{name}' on '{own_cluster.home}'.*see that the server is up"):
            trajectories.select()
        await asyncio.to_thread(own_cluster.start)
    enough = len(kept) + 20
    while len(kept) < enough:
        await asyncio.sleep(0.01)
    stop.set()
    await asyncio.gather(*living)
    assert refusals and all(f"the database '{name}' on" in refusal for refusal in refusals)
    for trajectory_id in {trajectory_id for trajectory_id, _ in kept}:
        positions = [step.position for step in trajectories.steps(trajectory_id)]
        assert positions == list(range(len(positions)))
        assert {position for it, position in kept if it == trajectory_id} <= set(positions)
    assert database.check() == []
    database.close()


async def test_a_restart_between_two_writes_is_not_noticed(own_cluster: Cluster):
    database = Database(own_cluster.url(own_cluster.create_database()))
    await database.write(add_document("before"))
    assert titles(database) == {"before"}
    await asyncio.to_thread(own_cluster.stop)
    await asyncio.to_thread(own_cluster.start)
    await database.write(add_document("after"))
    assert titles(database) == {"before", "after"}
    database.close()


DIE_AT_COMMIT = (
    "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$",
    "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON documents DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
    "WHEN (new.title = 'fatal') EXECUTE FUNCTION die()",
)


async def test_a_connection_lost_in_the_commit_leaves_a_doubt_that_is_told_and_nothing_runs_twice(cluster: Cluster):
    name, runs = cluster.create_database(), []
    database = Database(cluster.url(name))
    cluster.run_sql(name, *DIE_AT_COMMIT)
    with pytest.raises(StorageError, match=f"lost the database '{name}' .* see whether it is there"):
        await database.write(lambda session: runs.append(1) or add_document("fatal")(session))
    await database.write(add_document("after"))
    assert titles(database) == {"after"} and len(runs) == 1
    database.close()


def test_a_database_that_is_not_there_and_one_of_another_encoding_are_named(cluster: Cluster):
    with pytest.raises(StorageError, match=r"'missing' on .*does not exist; create the database and its user first"):
        Database(cluster.url("missing"))
    cluster.run_sql("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(StorageError, match=r"'latin' on .*'LATIN1'; create it with ENCODING 'UTF8'"):
        Database(cluster.url("latin"))


async def test_commits_are_on_the_disk_and_a_stricter_setting_stays(cluster: Cluster, postgresql: str):
    name = postgresql.partition("?")[0].rpartition("/")[2]
    for given, wanted in (("off", "on"), ("remote_apply", "remote_apply")):
        cluster.run_sql("postgres", f"ALTER DATABASE {name} SET synchronous_commit = '{given}'")
        database = Database(postgresql)
        assert await database.write(lambda session: ask(session, "SHOW synchronous_commit")) == wanted
        database.close()
    cluster.run_sql("postgres", f"ALTER DATABASE {name} RESET synchronous_commit")


def ask(session: Session, question: str) -> str:
    return session.connection().exec_driver_sql(question).scalar_one()


async def test_of_two_writers_one_sees_what_the_other_did(database_there: Database, other: Database):
    first, second = Policies(database_there), Policies(other)
    await first.register_base("pocket")
    drafts = await asyncio.gather(*(policies.draft() for policies in (first, second) * 8))
    assert sorted(policy.version for policy in drafts) == list(range(1, 17))
    await asyncio.gather(*((first, second)[policy.version % 2].promote(policy.version) for policy in drafts))
    assert [policy.stage for policy in first.select()].count(PolicyStage.ACTIVE) == 1
    assert len(second.activations()) == 17
    opened = await asyncio.gather(
        *(Cycles(database).open({}) for database in (database_there, other) * 4), return_exceptions=True
    )
    assert [type(it) for it in opened].count(CycleInProgress) == 7


async def test_a_writer_that_hangs_holds_others_up_only_so_long(
    database_there: Database, postgresql: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(home, "WRITER", "SET lock_timeout = '100ms'")
    impatient = Database(postgresql)
    is_held, release = threading.Event(), threading.Event()
    held = asyncio.ensure_future(database_there.write(lambda session: is_held.set() or release.wait(10)))
    await asyncio.to_thread(is_held.wait)
    with pytest.raises(StorageError, match="another process holds the database's write lock"):
        await impatient.write(add_document("late"))
    release.set()
    await held
    await impatient.write(add_document("late"))
    assert titles(database_there) == {"late"}
    impatient.close()


OPENER = "import sys; from memory.storage.database import Database; Database(sys.argv[1]).close()"


def test_processes_that_open_a_new_database_at_once_all_find_it_made(cluster: Cluster):
    url = cluster.url(cluster.create_database())
    openers = [
        subprocess.Popen([sys.executable, "-c", OPENER, url], cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)
    ]
    said = [opener.communicate(timeout=60)[1] for opener in openers]
    assert [opener.returncode for opener in openers] == [0, 0], said


async def test_rows_move_from_a_file_to_a_server_and_life_goes_on(tmp_path: Path, postgresql: str):
    config = PATIENT.model_copy(update={"database": postgresql})
    with Memory.open(tmp_path, PATIENT, encoder=HashingEncoder()) as memory:
        lived = await play(memory, "look", task_text="fry the carrot")
        await memory.documents.ingest("Stove", "How to fry.")
        await memory.policies.draft(parent=0)
        await memory.policies.promote(1)
        steps, active = memory.trajectories.steps(lived.id), memory.policies.active()
    counts = copy_to_server(tmp_path, config)
    assert (counts["trajectories"], counts["steps"], counts["activations"]) == (1, 2, 2)
    with pytest.raises(ValueError, match=r"holds .* already: copy into an empty one"):
        copy_to_server(tmp_path, config)
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        assert memory.trajectories.get(lived.id) == lived and memory.trajectories.steps(lived.id) == steps
        assert memory.policies.active() == active
        await memory.policies.rollback()
        assert [it.id for it in memory.policies.activations()] == [1, 2, 3]
        await memory.index.drain()
        assert memory.index.count() == {"insights": 0, "exemplars": 1, "passages": 1}


async def test_what_a_column_cannot_hold_is_a_bad_value_and_no_storage_failure(database_there: Database):
    with pytest.raises(ValueError, match="cannot keep such a value"):
        await database_there.write(add_document("long " + "".join(map(str, range(100_000)))))
    trajectories = Trajectories(database_there)
    assert trajectories.newest_of("nul \x00 in an id", tenant="") is None
    with pytest.raises(ValueError, match="cannot keep such a value"):
        trajectories.select(policy=2**40)
