"""Where the rows live, in one SQLite file or on a PostgreSQL server, and all in which the two differ.

This module refuses to know what the rows mean, and how writes are queued. What it gives is the same for both: an
engine that writes, one process at a time, each transaction on the disk when it is committed; and one that reads a
single moment and cannot write.

Invariants: no message names a password; SQLite's one writing connection is also the one that checkpoints.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Executable,
    Insert,
    PoolProxiedConnection,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy import Dialect as EngineDialect
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlmodel import Session

from memory.errors import StorageError
from memory.schema import dump_json

MAX_READERS = 16
KEPT_READERS = 4  # connections that stay open when nobody reads
SQLITE_WRITER = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "busy_timeout=30000",
    "foreign_keys=ON",
    "mmap_size=0",
    "journal_size_limit=67108864",
    "wal_autocheckpoint=8000",  # pages, should `tidy` be late
)
CHECKPOINT_WRITES = 512
SQLITE_READER = ("busy_timeout=30000", "query_only=ON", "wal_autocheckpoint=0", "mmap_size=0")
SQLITE_MENDS = {
    "full": "free some disk space; nothing that was acknowledged is lost",
    "readonly": "make the file and its directory writable",
    "unable to open": "check that the directory exists and is writable",
    "malformed": "restore a backup: the file is damaged",
    "not a database": "restore a backup: the file is damaged",
    "locked": "close the other program that writes to it",
}

WRITE_LOCK = 0x52415443  # of all processes that write to one PostgreSQL database; any number would do
LOCK_FOR_WRITING = f"SELECT pg_advisory_xact_lock({WRITE_LOCK})"
# A replica's stricter setting stays; one that acknowledges before the disk has it does not. Who holds the lock and
# hangs is thrown out before those who wait for it give up.
POSTGRESQL_WRITER = """
SET lock_timeout = '30s'; SET idle_in_transaction_session_timeout = '20s';
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
POSTGRESQL_READER = """
SET default_transaction_isolation = 'repeatable read'; SET default_transaction_read_only = on;
SET statement_timeout = '30s'
"""
# A server that vanished is noticed: by libpq's defaults a dead connection may hang for hours.
POSTGRESQL_CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
    "application_name": "ratchet",
}
POSTGRESQL_MENDS = {  # by SQLSTATE, or by words where a connection was refused, which comes without one
    "25006": "connect to the primary: this server only reads",
    "42501": "let the user create and change tables",
    "53100": "free some disk space on the server; nothing that was acknowledged is lost",
    "55P03": "another process holds the database's write lock: see what it does",
    "password": "check the user's name and password (PGPASSWORD, or a password file)",
    " does not exist": "create the database and its user first",
    "too many": "raise the server's max_connections",
}
VALUES_THAT_CANNOT_BE = ("22", "54")  # SQLSTATE classes: out of range, no Unicode, too long for an index


class Dialect(Protocol):
    """One place for rows, with its two engines."""

    name: str
    place: str
    """For messages: quoted, and without a password."""
    writing: Engine
    reading: Engine

    def is_in_transaction(self, connection: Connection) -> bool:
        """Whether what ran in the transaction can still be committed: some failures end it behind SQLAlchemy's back."""
        ...

    def bind(self, statement: Insert, values: Mapping[str, Any]) -> Any:
        """Return a row for `take`, made of those values that the statement names."""
        ...

    def take(self, connection: Connection, statement: Insert, rows: Sequence[Any]) -> list[bool | Exception]:
        """Run a statement once for each row, and return whether it took it, or what it raised, which changed nothing.

        Raises: what ended the whole transaction.
        """
        ...

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """Return the rows that a statement finds in what is committed: of numbers and plain texts, which every driver
        has alike."""
        ...

    def close(self) -> None:
        """Close every connection."""
        ...

    def tidy(self, connection: Connection, num_writes: int) -> None:
        """Do what may be done later, now that those who made the last writes are told: nobody waits for it."""
        ...

    def check(self, session: Session) -> list[str]:
        """Return what is wrong with the rows' home."""
        ...

    def translate(self, error: DBAPIError) -> Exception:
        """Return what to raise in an error's place: StorageError, or ValueError for a value that can't be kept."""
        ...


def dialect_of(path_or_url: Path | str) -> Dialect:
    """Return the place that a path or a URL names; nothing is opened yet. Raises: ValueError for any other."""
    written = str(path_or_url)
    if isinstance(path_or_url, Path) or "://" not in written:
        return Sqlite(Path(written))
    if written.startswith("sqlite:///"):
        return Sqlite(Path(written.removeprefix("sqlite:///")))
    try:
        url = make_url(written)
    except (ArgumentError, ValueError):  # its text is not repeated: it may hold a password
        raise ValueError("the database's URL is none: write it like postgresql+psycopg://USER@HOST/NAME") from None
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ValueError(
            f"unsupported database {url.drivername!r}: give a path, or a URL that begins with sqlite:/// or "
            "postgresql+psycopg://"
        )
    return Postgresql(url.set(drivername="postgresql+psycopg"))


def holds_password(path_or_url: Path | str | None) -> bool:
    """Return whether a URL says a password itself."""
    try:
        url = make_url(str(path_or_url))
    except (ArgumentError, ValueError):
        return False
    return url.password is not None or "password" in url.query


class Sqlite:
    """One file. SQLite itself lets one connection write at a time."""

    name = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = repr(str(path))
        self.writing = _open_sqlite(path, SQLITE_WRITER, begin="BEGIN IMMEDIATE", num_connections=1)
        self.reading = _open_sqlite(path, SQLITE_READER, begin="BEGIN", num_connections=MAX_READERS)
        self._compiled = _CompiledOnce(self.writing.dialect)
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
                said = DBAPIError.instance(sql, row, error, sqlite3.Error, hide_parameters=True)
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
                raise DBAPIError.instance(compiled.sql, row, error, sqlite3.Error, hide_parameters=True) from error

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
        mend = next((mend for sign, mend in SQLITE_MENDS.items() if sign in said), "check the disk")
        return StorageError(f"cannot use the database {self.place}: {said}; {mend}")


class Postgresql:
    """One database on a server. One of its locks lets one process write at a time, as SQLite's file does: so whoever
    looks before writing sees what will still be true when it writes, without a lock or a second try of its own."""

    name = "postgresql"

    def __init__(self, url: URL) -> None:
        host = url.host or url.query.get("host") or "localhost"
        server = host if isinstance(host, str) else ",".join(host)
        self.place = f"{url.database!r} on {f'{server}:{url.port}' if url.port else server!r}"
        self.writing = _open_postgresql(self, url, POSTGRESQL_WRITER, num_connections=1)
        self.reading = _open_postgresql(self, url, POSTGRESQL_READER, num_connections=MAX_READERS)
        self._compiled = _CompiledOnce(self.writing.dialect)

        @event.listens_for(self.writing, "begin")
        def _wait_for_others(connection: Connection) -> None:
            connection.exec_driver_sql(LOCK_FOR_WRITING)

    def is_in_transaction(self, connection: Connection) -> bool:
        from psycopg.pq import TransactionStatus

        return connection.connection.driver_connection.info.transaction_status == TransactionStatus.INTRANS

    def bind(self, statement: Insert, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values[name] for name in self._compiled.get(statement).names}

    def take(self, connection: Connection, statement: Insert, rows: Sequence[Any]) -> list[bool | Exception]:
        # All at once, which is one answer of the server to wait for; one by one where one of them can't be.
        if len(rows) > 1:
            try:
                with connection.begin_nested() as savepoint:
                    if connection.execute(statement, rows).rowcount == len(rows):
                        return [True] * len(rows)
                    savepoint.rollback()
            except SQLAlchemyError:
                if not self.is_in_transaction(connection):
                    raise
        came: list[bool | Exception] = []
        for row in rows:
            try:
                came.append(connection.execute(statement, row).rowcount == 1)
            except SQLAlchemyError as error:
                if not self.is_in_transaction(connection):
                    raise
                came.append(error)
        return came

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        with self.reading.connect() as connection:
            return connection.execute(statement, values).all()

    def close(self) -> None:
        self.reading.dispose()
        self.writing.dispose()

    def tidy(self, connection: Connection, num_writes: int) -> None:
        """Nothing: the server looks after its log."""

    def check(self, session: Session) -> list[str]:
        """Return what the server knows to be wrong. It enforces keys by itself, and looks at pages as it reads them."""
        off = session.execute(
            text("SELECT name FROM pg_settings WHERE name IN ('fsync', 'full_page_writes') AND setting = 'off'")
        )
        damaged = session.execute(
            text("SELECT checksum_failures FROM pg_stat_database WHERE datname = current_database()")
        )
        invalid = session.execute(text("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"))
        return [
            *(f"the server's {name} is off: a power cut may lose what was acknowledged" for (name,) in off),
            *(f"{num} pages failed their checksums" for (num,) in damaged if num),
            *(f"index {name} is invalid" for (name,) in invalid),
        ]

    def translate(self, error: DBAPIError) -> Exception:
        said = " ".join(str(error.orig).split())
        code = getattr(error.orig, "sqlstate", None) or ""
        if code[:2] in VALUES_THAT_CANNOT_BE or type(error.orig).__name__ == "DataError":
            return ValueError(f"the database cannot keep such a value: {said}")
        mends = (mend for sign, mend in POSTGRESQL_MENDS.items() if sign in f"{code} {said}")
        mend = next(mends, "see that the server is up and can be reached, and what its log says")
        return StorageError(f"cannot use the database {self.place}: {said}; {mend}")


class _Compiled:
    """A statement as the driver takes it."""

    def __init__(self, statement: Executable, dialect: EngineDialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.sql = compiled.string
        self.names = [name for name, parameter in compiled.binds.items() if parameter.required]
        given = {
            name: parameter.effective_value for name, parameter in compiled.binds.items() if not parameter.required
        }
        order = compiled.positiontup or []
        self._template = [given.get(name) for name in order]
        self._places = [(place, name) for place, name in enumerate(order) if name not in given]
        self._processed = []
        """Place, how to make the driver's value of ours, whether None is to be made one too."""
        for place, name in enumerate(order):
            kind = compiled.binds[name].type
            process = kind.dialect_impl(dialect).bind_processor(dialect)
            if process is not None and name in given:
                self._template[place] = process(given[name])
            elif process is not None:
                self._processed.append((place, process, kind.should_evaluate_none))

    def bind(self, values: Mapping[str, Any]) -> list[Any]:
        """Return what stands in the statement's places, in their order."""
        row = self._template.copy()
        for place, name in self._places:
            row[place] = values[name]
        for place, process, takes_none in self._processed:
            if takes_none or row[place] is not None:
                row[place] = process(row[place])
        return row


class _CompiledOnce:
    """Statements by themselves: each is compiled when it first comes."""

    def __init__(self, dialect: EngineDialect) -> None:
        self._dialect = dialect
        self._compiled: dict[Executable, _Compiled] = {}

    def get(self, statement: Executable) -> _Compiled:
        if statement not in self._compiled:
            self._compiled[statement] = _Compiled(statement, self._dialect)
        return self._compiled[statement]


def _open_sqlite(path: Path, pragmas: tuple[str, ...], *, begin: str, num_connections: int) -> Engine:
    """Make a pool of connections that each begin with `pragmas` and begin transactions in their own way."""
    engine = create_engine(
        f"sqlite:///{path}",
        **_pool_of(num_connections),
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


def _open_postgresql(home: Postgresql, url: URL, settings: str, *, num_connections: int) -> Engine:
    """Make a pool of connections that each begin with `settings`."""
    try:
        engine = create_engine(
            url,
            **_pool_of(num_connections),
            # A restart of the server breaks every idle connection; the writer finds out by itself, without a ping.
            pool_pre_ping=num_connections > 1,
            connect_args={name: value for name, value in POSTGRESQL_CONNECTION.items() if name not in url.query},
            json_serializer=dump_json,
            use_native_hstore=False,
        )
    except ModuleNotFoundError as error:
        raise StorageError(
            f"cannot use the database {home.place}: {error.name!r} is not installed; "
            "install the extra `postgres`: pip install -e '.[postgres]'"
        ) from error

    @event.listens_for(engine, "connect")
    def _prepare(dbapi_connection: Any, _record: Any) -> None:
        encoding = dbapi_connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise StorageError(
                f"cannot use the database {home.place}: its encoding is {encoding!r}; create it with ENCODING 'UTF8'"
            )
        dbapi_connection.adapters.register_dumper(str, _make_text_dumper())
        dbapi_connection.execute(settings)
        dbapi_connection.commit()

    return engine


def _pool_of(num_connections: int) -> dict[str, int]:
    kept = min(num_connections, KEPT_READERS)
    return {"pool_size": kept, "max_overflow": num_connections - kept}


def _make_text_dumper() -> type:
    """Return how text is sent: PostgreSQL's holds no NUL, which only ids and names of a client's could bring here."""
    from psycopg.types.string import StrDumperUnknown

    class TextWithoutNul(StrDumperUnknown):
        def dump(self, value: str) -> Any:
            return super().dump(value.replace("\x00", "\ufffd"))

    return TextWithoutNul
