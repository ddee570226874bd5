"""The interface to one SQLite file or PostgreSQL database, and the choice between them.

Both offer an engine for writing, with one writing process at a time and durable commits, and an engine for reading,
which sees one snapshot and cannot write.

Invariant: no message contains a password.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, Executable, Insert, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlmodel import Session

from memory.storage.postgresql import Postgresql
from memory.storage.sqlite import Sqlite


class Dialect(Protocol):
    """One database, with its two engines. `Database` uses it."""

    name: str
    location: str
    """The file or server, for messages: quoted, and without a password."""
    writing: Engine
    reading: Engine

    def is_in_transaction(self, connection: Connection) -> bool:
        """Return whether the transaction can still be committed: some failures end it unnoticed by SQLAlchemy."""
        ...

    def bind(self, statement: Insert, values: Mapping[str, Any]) -> Any:
        """Return a row for `insert_rows`, with the values that the statement binds."""
        ...

    def insert_rows(self, connection: Connection, statement: Insert, rows: Sequence[Any]) -> list[bool | Exception]:
        """Run a guarded INSERT once for each row; return for each whether it was added, or the error, which changed
        nothing.

        Raises: an error that ended the whole transaction.
        """
        ...

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """Return the committed rows of a query. Numbers and plain texts only: drivers differ in other types."""
        ...

    def close(self) -> None:
        """Close every connection."""
        ...

    def after_commit(self, connection: Connection, num_writes: int) -> None:
        """Do maintenance after the futures of a commit of `num_writes` writes were resolved."""
        ...

    def check(self, session: Session) -> list[str]:
        """Return the problems of the database."""
        ...

    def translate(self, error: DBAPIError) -> Exception:
        """Return the error to raise instead: StorageError, or ValueError for a value that cannot be stored."""
        ...


def dialect_of(path_or_url: Path | str) -> Dialect:
    """Return the dialect for a path or URL, without connecting. Raises: ValueError for an unsupported one."""
    written = str(path_or_url)
    if isinstance(path_or_url, Path) or "://" not in written:
        return Sqlite(Path(written))
    if written.startswith("sqlite:///"):
        return Sqlite(Path(written.removeprefix("sqlite:///")))
    try:
        url = make_url(written)
    except (ArgumentError, ValueError):  # the message must not repeat the text: it may hold a password
        raise ValueError(
            "memory.database is not a valid database URL: write it like postgresql+psycopg://USER@HOST/NAME"
        ) from None
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ValueError(
            f"unsupported database {url.drivername!r}: give a path, or a URL that begins with sqlite:/// or "
            "postgresql+psycopg://"
        )
    return Postgresql(url.set(drivername="postgresql+psycopg"))


def holds_password(path_or_url: Path | str | None) -> bool:
    """Return whether a URL contains a password."""
    try:
        url = make_url(str(path_or_url))
    except (ArgumentError, ValueError):
        return False
    return url.password is not None or "password" in url.query
