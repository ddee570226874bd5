"""The PostgreSQL dialect: connections, the write lock, and messages for the server's errors.

Invariant: no message contains a password.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, Executable, Insert, create_engine, event, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlmodel import Session

from memory.errors import StorageError
from memory.schema import dump_json
from memory.storage.sql import MAX_READERS, StatementCache, pool_of

if TYPE_CHECKING:
    import psycopg

WRITE_LOCK = 0x52415443  # shared by all processes that write to one PostgreSQL database; an arbitrary number
LOCK_FOR_WRITING = f"SELECT pg_advisory_xact_lock({WRITE_LOCK})"
# A stricter synchronous_commit, as with replicas, stays; `off` would acknowledge writes that are not on the disk. The
# idle timeout is below the lock timeout, so that a hanging lock owner is disconnected before the waiters give up.
WRITER = """
SET lock_timeout = '30s'; SET idle_in_transaction_session_timeout = '20s';
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
READER = """
SET default_transaction_isolation = 'repeatable read'; SET default_transaction_read_only = on;
SET statement_timeout = '30s'
"""
# With libpq's defaults a connection to a vanished server may hang for hours.
CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
    "application_name": "ratchet",
}
ADVICE = {  # by SQLSTATE, or by message where a refused connection has no SQLSTATE
    "25006": "connect to the primary: this server only reads",
    "42501": "let the user create and change tables",
    "53100": "free some disk space on the server; nothing that was acknowledged is lost",
    "55P03": "another process holds the database's write lock: see what it does",
    "password": "check the user's name and password (PGPASSWORD, or a password file)",
    " does not exist": "create the database and its user first",
    "too many": "raise the server's max_connections",
}
INVALID_VALUES = ("22", "54")  # SQLSTATE classes: out of range, no Unicode, too long for an index


class Postgresql:
    """One database on a server.

    An advisory lock lets one process write at a time, as SQLite's file lock does: a write that reads first sees rows
    that nobody changes before it commits, without locks or retries of its own.
    """

    name = "postgresql"

    def __init__(self, url: URL) -> None:
        host = url.host or url.query.get("host") or "localhost"
        server = host if isinstance(host, str) else ",".join(host)
        self.location = f"{url.database!r} on {f'{server}:{url.port}' if url.port else server!r}"
        self.writing = _open(self, url, WRITER, num_connections=1)
        self.reading = _open(self, url, READER, num_connections=MAX_READERS)
        self._compiled = StatementCache(self.writing.dialect)

        @event.listens_for(self.writing, "begin")
        def _wait_for_others(connection: Connection) -> None:
            connection.exec_driver_sql(LOCK_FOR_WRITING)

    def is_in_transaction(self, connection: Connection) -> bool:
        from psycopg.pq import TransactionStatus

        # SQLAlchemy does not know that a failed statement has ended the transaction; the driver does.
        driver: Any = connection.connection.driver_connection
        return driver.info.transaction_status == TransactionStatus.INTRANS

    def bind(self, statement: Insert, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values[name] for name in self._compiled.get(statement).names}

    def insert_rows(self, connection: Connection, statement: Insert, rows: Sequence[Any]) -> list[bool | Exception]:
        # All rows in one round trip; one by one when a row fails or is not added.
        if len(rows) > 1:
            try:
                with connection.begin_nested() as savepoint:
                    if connection.execute(statement, rows).rowcount == len(rows):
                        return [True] * len(rows)
                    savepoint.rollback()
            except SQLAlchemyError:
                if not self.is_in_transaction(connection):
                    raise
        results: list[bool | Exception] = []
        for row in rows:
            try:
                results.append(connection.execute(statement, row).rowcount == 1)
            except SQLAlchemyError as error:
                if not self.is_in_transaction(connection):
                    raise
                results.append(error)
        return results

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        with self.reading.connect() as connection:
            return connection.execute(statement, values).all()

    def close(self) -> None:
        self.reading.dispose()
        self.writing.dispose()

    def after_commit(self, connection: Connection, num_writes: int) -> None:
        """Do nothing: the server maintains its log."""

    def check(self, session: Session) -> list[str]:
        """Return the problems that the server reports. It enforces foreign keys, and checks pages as it reads them."""
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
        message = " ".join(str(error.orig).split())
        code = getattr(error.orig, "sqlstate", None) or ""
        if code[:2] in INVALID_VALUES or type(error.orig).__name__ == "DataError":
            return ValueError(f"the database cannot keep such a value: {message}")
        matching = (advice for sign, advice in ADVICE.items() if sign in f"{code} {message}")
        advice = next(matching, "see that the server is up and can be reached, and what its log says")
        return StorageError(f"cannot use the database {self.location}: {message}; {advice}")


def _open(database: Postgresql, url: URL, settings: str, *, num_connections: int) -> Engine:
    """Return an engine whose connections each begin with the statements `settings`."""
    try:
        engine = create_engine(
            url,
            **pool_of(num_connections),
            # A restart of the server breaks every idle connection. The writer reconnects by itself, without a ping.
            pool_pre_ping=num_connections > 1,
            connect_args={name: value for name, value in CONNECTION.items() if name not in url.query},
            json_serializer=dump_json,
            use_native_hstore=False,
        )
    except ModuleNotFoundError as error:
        raise StorageError(
            f"cannot use the database {database.location}: {error.name!r} is not installed; "
            "install the extra `postgres`: pip install -e '.[postgres]'"
        ) from error

    @event.listens_for(engine, "connect")
    def _prepare(dbapi_connection: psycopg.Connection, _record: object) -> None:
        encoding = dbapi_connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise StorageError(
                f"cannot use the database {database.location}: its encoding is {encoding!r}; "
                "create it with ENCODING 'UTF8'"
            )
        dbapi_connection.adapters.register_dumper(str, _make_text_dumper())
        dbapi_connection.execute(settings.encode())
        dbapi_connection.commit()

    return engine


def _make_text_dumper() -> type:
    """Return a psycopg dumper that replaces NUL, which PostgreSQL's text cannot hold; clients' ids may contain it."""
    from psycopg.types.string import StrDumperUnknown

    class TextWithoutNul(StrDumperUnknown):
        def dump(self, obj: str) -> Any:
            return super().dump(obj.replace("\x00", "\ufffd"))

    return TextWithoutNul
