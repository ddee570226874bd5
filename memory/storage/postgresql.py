"""A PostgreSQL database as a home of rows: how it is opened and locked, and what its errors mean.

This module refuses to know what the rows mean. Invariant: no message names a password.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import URL, Connection, Engine, Executable, Insert, create_engine, event, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlmodel import Session

from memory.errors import StorageError
from memory.schema import dump_json
from memory.storage.sql import MAX_READERS, StatementCache, pool_of

WRITE_LOCK = 0x52415443  # of all processes that write to one PostgreSQL database; any number would do
LOCK_FOR_WRITING = f"SELECT pg_advisory_xact_lock({WRITE_LOCK})"
# A replica's stricter setting stays; one that acknowledges before the disk has it does not. Who holds the lock and
# hangs is thrown out before those who wait for it give up.
WRITER = """
SET lock_timeout = '30s'; SET idle_in_transaction_session_timeout = '20s';
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
READER = """
SET default_transaction_isolation = 'repeatable read'; SET default_transaction_read_only = on;
SET statement_timeout = '30s'
"""
# A server that vanished is noticed: by libpq's defaults a dead connection may hang for hours.
CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
    "application_name": "ratchet",
}
MENDS = {  # by SQLSTATE, or by words where a connection was refused, which comes without one
    "25006": "connect to the primary: this server only reads",
    "42501": "let the user create and change tables",
    "53100": "free some disk space on the server; nothing that was acknowledged is lost",
    "55P03": "another process holds the database's write lock: see what it does",
    "password": "check the user's name and password (PGPASSWORD, or a password file)",
    " does not exist": "create the database and its user first",
    "too many": "raise the server's max_connections",
}
VALUES_THAT_CANNOT_BE = ("22", "54")  # SQLSTATE classes: out of range, no Unicode, too long for an index


class Postgresql:
    """One database on a server. One of its locks lets one process write at a time, as SQLite's file does: so whoever
    looks before writing sees what will still be true when it writes, without a lock or a second try of its own."""

    name = "postgresql"

    def __init__(self, url: URL) -> None:
        host = url.host or url.query.get("host") or "localhost"
        server = host if isinstance(host, str) else ",".join(host)
        self.place = f"{url.database!r} on {f'{server}:{url.port}' if url.port else server!r}"
        self.writing = _open(self, url, WRITER, num_connections=1)
        self.reading = _open(self, url, READER, num_connections=MAX_READERS)
        self._compiled = StatementCache(self.writing.dialect)

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
        mends = (mend for sign, mend in MENDS.items() if sign in f"{code} {said}")
        mend = next(mends, "see that the server is up and can be reached, and what its log says")
        return StorageError(f"cannot use the database {self.place}: {said}; {mend}")


def _open(home: Postgresql, url: URL, settings: str, *, num_connections: int) -> Engine:
    """Make a pool of connections that each begin with `settings`."""
    try:
        engine = create_engine(
            url,
            **pool_of(num_connections),
            # A restart of the server breaks every idle connection; the writer finds out by itself, without a ping.
            pool_pre_ping=num_connections > 1,
            connect_args={name: value for name, value in CONNECTION.items() if name not in url.query},
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


def _make_text_dumper() -> type:
    """Return how text is sent: PostgreSQL's holds no NUL, which only ids and names of a client's could bring here."""
    from psycopg.types.string import StrDumperUnknown

    class TextWithoutNul(StrDumperUnknown):
        def dump(self, value: str) -> Any:
            return super().dump(value.replace("\x00", "\ufffd"))

    return TextWithoutNul
