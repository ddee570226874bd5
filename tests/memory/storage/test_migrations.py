"""The migrations lead to the current schema."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect
from sqlmodel import SQLModel

from memory.config import MemoryConfig
from memory.errors import DatabaseTooNew
from memory.records.trajectories import Trajectories
from memory.storage.database import Database
from memory.storage.migrations.upgrade import _make_config, upgrade
from memory.store import Memory
from tests.memory.episodes import HashingEncoder
from tests.support.postgresql import HOMES, Cluster


@pytest.fixture(params=HOMES)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """A database without tables."""
    if request.param == "sqlite":
        return tmp_path / "ratchet.db"
    cluster: Cluster = request.getfixturevalue("cluster")
    return cluster.url(cluster.create_database())


@contextlib.contextmanager
def connect(location: Path | str) -> Iterator[Connection]:
    """Yield a connection of the test's own."""
    engine = create_engine(location if isinstance(location, str) else f"sqlite:///{location}")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@pytest.fixture
def connection(location: Path | str) -> Iterator[Connection]:
    """A connection to an upgraded database."""
    Database(location).close()
    with connect(location) as connection:
        yield connection


def tables_of(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


def test_the_revisions_lead_to_the_schema(connection: Connection):
    differences = compare_metadata(MigrationContext.configure(connection), SQLModel.metadata)
    assert differences == []


def test_an_interrupted_upgrade_leaves_nothing_and_resumes(location: Path | str, monkeypatch: pytest.MonkeyPatch):
    upgraded = []

    def upgrade_then_die(connection) -> None:
        with connection.begin():
            config = _make_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            upgraded.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr("memory.storage.database.upgrade", upgrade_then_die)
    with pytest.raises(KeyboardInterrupt):
        Database(location)
    with connect(location) as connection:
        assert upgraded and tables_of(connection) == set()

    monkeypatch.setattr("memory.storage.database.upgrade", upgrade)
    Database(location).close()
    database = Database(location)  # up to date: nothing to do
    assert database.check() == []
    database.close()


def test_the_rows_of_the_first_revision_live_on(location: Path | str):
    with connect(location) as connection, connection.begin():
        config = _make_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql(
            "INSERT INTO policies (version, stage, base_model, note, created_at) "
            "VALUES (0, 'active', 'pocket', '', '2026-11-22 00:00:00')"
        )
        connection.exec_driver_sql(
            "INSERT INTO trajectories (id, episode_id, kind, split, task_text, policy, stage, memory_text, num_steps, "
            "prompt_tokens, output_tokens, num_invalid_tool_calls, opened_at) "
            "VALUES ('trj_1', 'eps_1', 'chat', 'live', 'hi', 0, 'running', '', 0, 0, 0, 0, '2026-11-22 00:00:00')"
        )
        connection.exec_driver_sql(
            "INSERT INTO steps (trajectory_id, position, kind, content, seconds, created_at) "
            "VALUES ('trj_1', 0, 'model', 'hello', 0.5, '2026-11-22 00:00:00')"
        )
    database = Database(location)
    trajectories = Trajectories(database)
    (step,) = trajectories.steps("trj_1")
    assert (step.content, step.handover_digest) == ("hello", None)
    assert trajectories.waiting() == []
    database.close()


def run_revisions(location: Path | str, *statements: str, upgrade_to: str = "", downgrade_to: str = "") -> None:
    """Move a database to a revision, then run statements on it; foreign keys are enforced, as in the program."""
    with connect(location) as connection:
        if isinstance(location, Path):
            connection.exec_driver_sql("PRAGMA foreign_keys=ON")
            connection.commit()
        with connection.begin():
            config = _make_config()
            config.attributes["connection"] = connection
            if upgrade_to:
                command.upgrade(config, upgrade_to)
            if downgrade_to:
                command.downgrade(config, downgrade_to)
            for statement in statements:
                connection.exec_driver_sql(statement)


MOMENT = "'2026-11-22 00:00:00'"
ROWS_BEFORE_TENANTS = (
    f"INSERT INTO policies (version, stage, base_model, note, created_at) VALUES (0, 'active', 'pocket', '', {MOMENT})",
    "INSERT INTO trajectories (id, episode_id, kind, split, task_text, policy, stage, memory_text, num_steps, "
    "prompt_tokens, output_tokens, num_invalid_tool_calls, opened_at) "
    f"VALUES ('trj_1', 'eps_1', 'chat', 'live', 'hi', 0, 'running', '', 0, 0, 0, 0, {MOMENT})",
    "INSERT INTO insights (id, environment, kind, text, strength, wins, losses, wins_otherwise, losses_otherwise, "
    f"created_at) VALUES ('ins_1', 'kitchen', 'cooking', 'fry it', 2, 0, 0, 0, 0, {MOMENT})",
    f"INSERT INTO documents (id, title, digest, created_at) VALUES ('doc_1', 'Stove', 'd', {MOMENT})",
    "INSERT INTO passages (id, document_id, position, text) VALUES ('psg_1', 'doc_1', 0, 'How to fry.')",
    "INSERT INTO feedback (id, trajectory_id, name, value, source, tags, created_at) "
    f"VALUES ('fb_1', 'trj_1', 'reward', 'true', 'user', '{{}}', {MOMENT})",
    "CREATE TABLE word_entries (id INTEGER PRIMARY KEY, collection TEXT, row_id TEXT)",
)


def test_rows_from_before_tenants_are_the_default_tenants_and_can_go_back(
    location: Path | str, config: MemoryConfig, tmp_path: Path, encoder: HashingEncoder
):
    run_revisions(location, *ROWS_BEFORE_TENANTS, upgrade_to="0002")
    with Memory.open(tmp_path, config, encoder=encoder) as memory:
        assert memory.trajectories.get("trj_1", tenant="").task_text == "hi"
        assert [insight.text for insight in memory.insights.active()] == ["fry it"]
        assert [passage.text for passage in memory.documents.passages("doc_1")] == ["How to fry."]
        assert [said.id for said in memory.feedback.select("trj_1")] == ["fb_1"]
        assert memory.database.check() == []
    others = (
        "INSERT INTO documents (id, tenant, title, digest, created_at) "
        f"VALUES ('doc_2', 'acme', 'Stove', 'd', {MOMENT})",
        "INSERT INTO passages (id, document_id, position, text) VALUES ('psg_2', 'doc_2', 0, 'How acme fries.')",
    )
    run_revisions(location, *others)
    run_revisions(location, downgrade_to="0002")
    with connect(location) as connection:
        assert connection.exec_driver_sql("SELECT id FROM documents").all() == [("doc_1",)]
        assert connection.exec_driver_sql("SELECT text FROM passages").all() == [("How to fry.",)]
        assert connection.exec_driver_sql("SELECT id FROM feedback").all() == [("fb_1",)]


async def test_an_index_from_before_tenants_is_filled_again(
    location: Path | str, config: MemoryConfig, tmp_path: Path, encoder: HashingEncoder
):
    run_revisions(location, *ROWS_BEFORE_TENANTS, upgrade_to="0002")
    with Memory.open(tmp_path, config, encoder=encoder) as memory:
        await memory.index.drain()
        assert memory.index.count() == {"insights": 1, "exemplars": 0, "passages": 1}
        assert await memory.retrieval.find_passages("how to fry", 3) == ["Stove: How to fry."]


def test_steps_of_the_version_before_teams_have_no_role_and_go_back_as_they_were(
    location: Path | str, config: MemoryConfig, tmp_path: Path, encoder: HashingEncoder
):
    run_revisions(location, *ROWS_BEFORE_TENANTS[:2], upgrade_to="0002")
    step = "INSERT INTO steps (trajectory_id, position, kind, content, seconds, created_at) VALUES "
    run_revisions(location, f"{step}('trj_1', 0, 'model', 'hello', 0, {MOMENT})", upgrade_to="0013")
    with Memory.open(tmp_path, config, encoder=encoder) as memory:
        (row,) = memory.trajectories.steps("trj_1")
        assert (row.content, row.role) == ("hello", None)
        assert memory.database.check() == []
    run_revisions(location, downgrade_to="0013")
    with connect(location) as connection:
        assert "role" not in {column["name"] for column in inspect(connection).get_columns("steps")}
        assert connection.exec_driver_sql("SELECT content FROM steps").all() == [("hello",)]


def test_a_downgrade_takes_everything_back(connection: Connection):
    with connection.begin():
        config = _make_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        assert tables_of(connection) == {"alembic_version"}


def test_a_database_from_the_future_is_refused(location: Path | str):
    Database(location).close()
    with connect(location) as connection, connection.begin():
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseTooNew, match=r"'9999'.*use the newer program"):
        Database(location)


def test_feedback_of_earlier_revisions_speaks_of_the_whole(location: Path | str):
    with connect(location) as connection, connection.begin():
        config = _make_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        for statement in ROWS_BEFORE_TENANTS[:2]:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql(
            "INSERT INTO feedback (id, trajectory_id, name, source, created_at) "
            "VALUES ('fb_1', 'trj_1', 'reward', 'user', '2026-11-22 00:00:00')"
        )
        command.upgrade(config, "head")
        row = connection.exec_driver_sql("SELECT target, answer_start, step FROM feedback").one()
        assert tuple(row) == ("trj_1", None, None)
        command.downgrade(config, "0002")
        columns = {column["name"] for column in inspect(connection).get_columns("feedback")}
    assert not columns & {"target", "answer_start", "step"}


def test_an_episode_that_read_a_web_page_before_there_was_trust_is_untrusted(location: Path | str):
    step = "INSERT INTO steps (trajectory_id, position, kind, tool_name, content, seconds, created_at) VALUES "
    read, added = f"('trj_1', 0, 'tool', 'fetch_page', 'news', 0, {MOMENT})", "('trj_2', 0, 'tool', 'add', '5', 0, "
    other = ROWS_BEFORE_TENANTS[1].replace("'trj_1', 'eps_1'", "'trj_2', 'eps_2'")
    statements = (*ROWS_BEFORE_TENANTS[:2], other, step + read, f"{step}{added}{MOMENT})")
    run_revisions(location, *statements, upgrade_to="0002")
    run_revisions(location, upgrade_to="0007")
    with connect(location) as connection:
        rows = connection.exec_driver_sql("SELECT id, trust FROM trajectories").all()
    assert sorted(tuple(row) for row in rows) == [("trj_1", "untrusted"), ("trj_2", "trusted")]


def test_feedback_of_earlier_revisions_keeps_its_order(location: Path | str):
    said = "INSERT INTO feedback (id, trajectory_id, name, source, created_at, tenant, user_id, target, tags) VALUES "
    rows = (f"('{name}', 'trj_1', 'reward', 'user', '{moment}', '', '', '', '{{}}')" for name, moment in POSTED.items())
    run_revisions(location, *ROWS_BEFORE_TENANTS[:2], upgrade_to="0002")
    run_revisions(location, upgrade_to="0009")
    run_revisions(location, *(said + row for row in rows), upgrade_to="0009")
    run_revisions(location, upgrade_to="0010")
    with connect(location) as connection:
        found = connection.exec_driver_sql("SELECT id, sequence FROM feedback ORDER BY sequence").all()
    assert [name for name, _ in found] == ["z", "m", "a"]
    assert found[1][1] - found[0][1] == 500_000 and found[0][1] == 1_793_750_400_000_000


POSTED = {"m": "2026-11-04 00:00:00.500000", "a": "2026-11-05 00:00:00.000000", "z": "2026-11-04 00:00:00.000000"}
