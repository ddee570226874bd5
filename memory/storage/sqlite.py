"""The SQLite dialect: connections and their pragmas, fast paths that bypass SQLAlchemy, and messages for errors.

Invariant: the single writing connection is also the one that checkpoints (see `memory.storage.database`).
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, Engine, Executable, Insert, PoolProxiedConnection, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from memory.errors import StorageError
from memory.schema import dump_json
from memory.storage.sql import MAX_READERS, StatementCache, pool_of

WRITER = (
    "journal_mode=WAL",  # readers and the writer do not block each other
    "synchronous=FULL",  # NORMAL would lose acknowledged commits in a power cut
    "busy_timeout=30000",  # milliseconds
    "foreign_keys=ON",  # off by default in SQLite
    "mmap_size=0",  # an I/O error in a mapped file would kill the process with SIGBUS
    "journal_size_limit=67108864",  # bytes
    "wal_autocheckpoint=8000",  # pages; a fallback in case `after_commit` is late
)
CHECKPOINT_WRITES = 512  # writes between two checkpoints
# Readers must never checkpoint: see the hazard in `memory.storage.database`.
READER = ("busy_timeout=30000", "query_only=ON", "wal_autocheckpoint=0", "mmap_size=0")
ADVICE = {
    "full": "free some disk space; nothing that was acknowledged is lost",
    "readonly": "make the file and its directory writable",
    "unable to open": "check that the directory exists and is writable",
    "malformed": "restore a backup: the file is damaged",
    "not a database": "restore a backup: the file is damaged",
    "locked": "close the other program that writes to it",
}


class Sqlite:
    """One file. SQLite's file lock lets one connection write at a time."""

    name = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = repr(str(path))
        # IMMEDIATE: a transaction that first reads and then writes would fail as busy, without waiting, if another
        # program wrote in between
        self.writing = _open(path, WRITER, begin="BEGIN IMMEDIATE", num_connections=1)
        self.reading = _open(path, READER, begin="BEGIN", num_connections=MAX_READERS)
        self._compiled = StatementCache(self.writing.dialect)
        self._num_writes = 0
        self._fetch_lock = threading.Lock()
        self._fetch_connection: PoolProxiedConnection | None = None

    def is_in_transaction(self, connection: Connection) -> bool:
        return _driver(connection.connection).in_transaction

    def bind(self, statement: Insert, values: Mapping[str, Any]) -> list[Any]:
        return self._compiled.get(statement).bind(values)

    def insert_rows(self, connection: Connection, statement: Insert, rows: Sequence[Any]) -> list[bool | Exception]:
        # Bypasses SQLAlchemy, which takes longer for a row than SQLite with its disk.
        driver = _driver(connection.connection)
        cursor, sql = driver.cursor(), self._compiled.get(statement).sql
        results: list[bool | Exception] = []
        for row in rows:
            try:
                cursor.execute(sql, row)
                results.append(cursor.rowcount == 1)
            except Exception as error:
                wrapped = _wrapped(error, sql, row)
                if not driver.in_transaction:
                    raise wrapped from error
                results.append(wrapped)
        return results

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        compiled = self._compiled.get(statement)
        row = compiled.bind(values)
        # One connection for all fetches, in autocommit: a pool and a transaction cost more than such a read.
        with self._fetch_lock:
            self._fetch_connection = self._fetch_connection or self.reading.raw_connection()
            try:
                return _driver(self._fetch_connection).execute(compiled.sql, row).fetchall()
            except sqlite3.Error as error:
                raise _wrapped(error, compiled.sql, row) from error

    def close(self) -> None:
        with self._fetch_lock:
            if self._fetch_connection is not None:
                self._fetch_connection.close()
        self.reading.dispose()
        self.writing.dispose()  # last, because the last connection to close checkpoints

    def after_commit(self, connection: Connection, num_writes: int) -> None:
        """Checkpoint every `CHECKPOINT_WRITES` writes, so that SQLite does not do it during a commit."""
        self._num_writes += num_writes
        if self._num_writes >= CHECKPOINT_WRITES:
            self._num_writes = 0
            # PASSIVE waits for no reader; what readers hold back is left to the next checkpoint
            with contextlib.suppress(sqlite3.Error):  # a full or broken disk shows in the next commit
                _driver(connection.connection).execute("PRAGMA wal_checkpoint(PASSIVE)")

    def check(self, session: Session) -> list[str]:
        """Return the problems that SQLite finds in the file. Reads every page."""
        connection = session.connection()
        problems = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        orphans = [
            f"{row[0]} row {row[1]} has no {row[2]}" for row in connection.exec_driver_sql("PRAGMA foreign_key_check")
        ]
        return [problem for problem in problems if problem != "ok"] + orphans

    def translate(self, error: DBAPIError) -> Exception:
        message = str(error.orig)
        advice = next((advice for sign, advice in ADVICE.items() if sign in message), "check the disk")
        return StorageError(f"cannot use the database {self.location}: {message}; {advice}")


def _driver(connection: PoolProxiedConnection) -> sqlite3.Connection:
    return cast(sqlite3.Connection, connection.driver_connection)


def _wrapped(error: Exception, sql: str, row: list[Any]) -> Exception:
    """Return the error that SQLAlchemy would raise, without the parameters: they may be private text."""
    return DBAPIError.instance(sql, row, error, sqlite3.Error, hide_parameters=True)


def _open(path: Path, pragmas: tuple[str, ...], *, begin: str, num_connections: int) -> Engine:
    """Return an engine whose connections set `pragmas` and begin each transaction with the statement `begin`."""
    engine = create_engine(
        f"sqlite:///{path}",
        **pool_of(num_connections),
        connect_args={"check_same_thread": False},
        json_serializer=dump_json,
    )

    @event.listens_for(engine, "connect")
    def _prepare(dbapi_connection: sqlite3.Connection, _record: object) -> None:
        dbapi_connection.isolation_level = None  # keeps the driver from beginning transactions itself
        for pragma in pragmas:
            dbapi_connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if begin == "BEGIN":  # cannot fail; bypasses SQLAlchemy, where it would take a third of a read
            _driver(connection.connection).execute(begin)
        else:
            connection.exec_driver_sql(begin)

    @event.listens_for(engine, "do_execute")
    def _skip_late_rollback(cursor: sqlite3.Cursor, statement: str, _parameters: object, _context: object) -> bool:
        # After some failures SQLite rolls back the whole transaction. A rollback to a savepoint would then fail and
        # hide the original error.
        return statement.startswith("ROLLBACK TO") and not cursor.connection.in_transaction

    return engine
