"""Where the rows live, in one SQLite file or on a PostgreSQL server: which of the two, and all in which they differ.

This module refuses to know what the rows mean, and how writes are queued. What it gives is the same for both: an
engine that writes, one process at a time, each transaction on the disk when it is committed; and one that reads a
single moment and cannot write.

Invariant: no message names a password.
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
