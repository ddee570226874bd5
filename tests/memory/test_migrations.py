"""The revisions, against the schema they must lead to."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine
from sqlmodel import SQLModel

from memory.database import Database
from memory.errors import DatabaseTooNew
from memory.migrations.upgrade import _make_config, upgrade
from memory.trajectories import Trajectories


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    """A connection of our own to a database that is up to date."""
    Database(tmp_path / "ratchet.db").close()
    engine = create_engine(f"sqlite:///{tmp_path / 'ratchet.db'}")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def test_the_revisions_lead_to_the_schema(connection: Connection):
    differences = compare_metadata(MigrationContext.configure(connection), SQLModel.metadata)
    assert differences == []


def test_an_interrupted_upgrade_leaves_nothing_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    upgraded = []

    def upgrade_then_die(connection) -> None:
        with connection.begin():
            config = _make_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            upgraded.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr("memory.database.upgrade", upgrade_then_die)
    with pytest.raises(KeyboardInterrupt):
        Database(tmp_path / "ratchet.db")
    connection = sqlite3.connect(tmp_path / "ratchet.db")
    assert upgraded and connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    connection.close()

    monkeypatch.setattr("memory.database.upgrade", upgrade)
    Database(tmp_path / "ratchet.db").close()
    database = Database(tmp_path / "ratchet.db")  # up to date: nothing to do
    assert database.check() == []
    database.close()


def test_the_rows_of_the_first_revision_live_on(tmp_path: Path):
    path = tmp_path / "ratchet.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection, connection.begin():
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
    engine.dispose()
    database = Database(path)
    trajectories = Trajectories(database)
    (step,) = trajectories.steps("trj_1")
    assert (step.content, step.handover_digest) == ("hello", None)
    assert trajectories.waiting() == []
    database.close()


def test_a_downgrade_takes_everything_back(connection: Connection):
    with connection.begin():
        config = _make_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        tables = {row[0] for row in connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"alembic_version"}


def test_a_database_from_the_future_is_refused(tmp_path: Path):
    Database(tmp_path / "ratchet.db").close()
    connection = sqlite3.connect(tmp_path / "ratchet.db")
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    with pytest.raises(DatabaseTooNew, match=r"'9999'.*use the newer program"):
        Database(tmp_path / "ratchet.db")


def test_feedback_of_earlier_revisions_speaks_of_the_whole(tmp_path: Path):
    path = tmp_path / "ratchet.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection, connection.begin():
        config = _make_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.exec_driver_sql(
            "INSERT INTO feedback (id, trajectory_id, name, source, created_at) "
            "VALUES ('fb_1', 'trj_1', 'reward', 'user', '2026-11-22 00:00:00')"
        )
        command.upgrade(config, "head")
        row = connection.exec_driver_sql("SELECT target, answer_start, step FROM feedback").one()
        assert tuple(row) == ("trj_1", None, None)
        command.downgrade(config, "0002")
        columns = {row[1] for row in connection.exec_driver_sql("PRAGMA table_info(feedback)")}
    engine.dispose()
    assert not columns & {"target", "answer_start", "step"}
