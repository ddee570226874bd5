"""One SQLite file as a home of rows: how it is opened, written and read past SQLAlchemy, and what its errors mean.

This module refuses to know what the rows mean. Invariant: the one connection that writes is also the one that
checkpoints.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Executable, Insert, PoolProxiedConnection, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from memory.errors import StorageError
from memory.schema import dump_json
from memory.storage.sql import MAX_READERS, StatementCache, pool_of

WRITER = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "busy_timeout=30000",
    "foreign_keys=ON",
    "mmap_size=0",
    "journal_size_limit=67108864",
    "wal_autocheckpoint=8000",  # pages, should `tidy` be late
)
CHECKPOINT_WRITES = 512
READER = ("busy_timeout=30000", "query_only=ON", "wal_autocheckpoint=0", "mmap_size=0")
MENDS = {
    "full": "free some disk space; nothing that was acknowledged is lost",
    "readonly": "make the file and its directory writable",
    "unable to open": "check that the directory exists and is writable",
    "malformed": "restore a backup: the file is damaged",
    "not a database": "restore a backup: the file is damaged",
    "locked": "close the other program that writes to it",
}


class Sqlite:
    """One file. SQLite itself lets one connection write at a time."""

    name = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = repr(str(path))
        self.writing = _open(path, WRITER, begin="BEGIN IMMEDIATE", num_connections=1)
        self.reading = _open(path, READER, begin="BEGIN", num_connections=MAX_READERS)
        self._compiled = StatementCache(self.writing.dialect)
        self._num_logged = 0
        self._asking = threading.Lock()
        self._asked: PoolProxiedConnection | None = None

    def is_in_transaction(self, connection: Connection) -> bool:
        return connection.connection.driver_connection.in_transaction

    def bind(self, statement: Insert, values: Mapping[str, Any]) -> list[Any]:
        return self._compiled.get(statement).bind(values)

    def take(self, connection: Connection, statement: Insert, rows: Sequence[Any]) -> list[bool | Exception]:
        # Past SQLAlchemy, which takes longer over a row than SQLite does with its disk.
        driver = connection.connection.driver_connection
        cursor, sql = driver.cursor(), self._compiled.get(statement).sql
        came: list[bool | Exception] = []
        for row in rows:
            try:
                cursor.execute(sql, row)
                came.append(cursor.rowcount == 1)
            except Exception as error:
                said = _as_alchemys(error, sql, row)
                if not driver.in_transaction:
                    raise said from error
                came.append(said)
        return came

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        compiled = self._compiled.get(statement)
        row = compiled.bind(values)
        with self._asking:
            self._asked = self._asked or self.reading.raw_connection()
            try:
                return self._asked.driver_connection.execute(compiled.sql, row).fetchall()
            except sqlite3.Error as error:
                raise _as_alchemys(error, compiled.sql, row) from error

    def close(self) -> None:
        with self._asking:
            if self._asked is not None:
                self._asked.close()
        self.reading.dispose()
        self.writing.dispose()  # last: the last connection out checkpoints

    def tidy(self, connection: Connection, num_writes: int) -> None:
        """Move what is in the log into the file, before SQLite does it in the midst of a commit."""
        self._num_logged += num_writes
        if self._num_logged >= CHECKPOINT_WRITES:
            self._num_logged = 0
            with contextlib.suppress(sqlite3.Error):  # what is full or broken shows in the next commit
                connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def check(self, session: Session) -> list[str]:
        """Return what SQLite finds wrong with the file. Reads every page."""
        connection = session.connection()
        problems = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        orphans = [
            f"{row[0]} row {row[1]} has no {row[2]}" for row in connection.exec_driver_sql("PRAGMA foreign_key_check")
        ]
        return [problem for problem in problems if problem != "ok"] + orphans

    def translate(self, error: DBAPIError) -> Exception:
        said = str(error.orig)
        mend = next((mend for sign, mend in MENDS.items() if sign in said), "check the disk")
        return StorageError(f"cannot use the database {self.place}: {said}; {mend}")


def _as_alchemys(error: Exception, sql: str, row: list[Any]) -> Exception:
    """Return what SQLAlchemy would have raised; its parameters, which may be anybody's words, are not shown."""
    return DBAPIError.instance(sql, row, error, sqlite3.Error, hide_parameters=True)


def _open(path: Path, pragmas: tuple[str, ...], *, begin: str, num_connections: int) -> Engine:
    """Make a pool of connections that each begin with `pragmas` and begin transactions in their own way."""
    engine = create_engine(
        f"sqlite:///{path}",
        **pool_of(num_connections),
        connect_args={"check_same_thread": False},
        json_serializer=dump_json,
    )

    @event.listens_for(engine, "connect")
    def _prepare(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None  # the driver must not begin transactions of its own
        for pragma in pragmas:
            dbapi_connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if begin == "BEGIN":  # touches nothing, so it cannot fail: past SQLAlchemy, where it would be a third of a read
            connection.connection.driver_connection.execute(begin)
        else:
            connection.exec_driver_sql(begin)

    @event.listens_for(engine, "do_execute")
    def _skip_what_is_undone(cursor: Any, statement: str, _parameters: Any, _context: Any) -> bool:
        # After a failure for which SQLite rolled everything back itself, a rollback to a savepoint that is gone
        # would fail and hide the failure.
        return statement.startswith("ROLLBACK TO") and not cursor.connection.in_transaction

    return engine
