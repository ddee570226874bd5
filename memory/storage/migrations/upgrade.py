"""Upgrades the tables of a database with Alembic, without its configuration file or command line.

Invariant: all missing revisions are applied in one transaction, or none.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection

from memory.errors import DatabaseTooNew


def upgrade(connection: Connection) -> None:
    """Apply the missing revisions to the database behind `connection`.

    Raises: DatabaseTooNew when it is at a revision that this version of the program does not know.
    """
    config = _make_config()
    scripts = ScriptDirectory.from_config(config)
    with connection.begin():
        present = MigrationContext.configure(connection).get_current_revision()
        if present == scripts.get_current_head():
            return
        _require_known(scripts, present)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _make_config() -> Config:
    config = Config()
    # Alembic interpolates `%` in its options.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def _require_known(scripts: ScriptDirectory, revision: str | None) -> None:
    if revision is None:
        return
    try:
        scripts.get_revision(revision)
    except CommandError as error:
        raise DatabaseTooNew(
            f"the database is at revision {revision!r}, which this version does not know: use the newer program"
        ) from error
