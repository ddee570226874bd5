"""A task's own SQLite database in memory, made from the tables of its row, and the SQL that a policy may run on it.

Invariant: a statement reaches nothing but these tables: no file, no other database, no setting, no extension. Time,
memory, temporary files (on Linux) and output of a statement are limited.
Hazard: SQLite asks whether to stop between its steps and never within a function, so sizes are limited such that none
takes longer than about a second.
Hazard: SQLite is not MySQL. Backticks work; functions such as CONCAT, and strict types, differ.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from pydantic import BaseModel, Field, model_validator

from runtime.errors import ToolError

STATEMENT_SECONDS = 5.0
MAX_BYTES = 64 * 2**20
PAGE_BYTES = 4096
MAX_RESULT_CHARS = 40_000
"""Of a result; rows after that are not read. The tool's own limit cuts the text further."""
MAX_VALUE_BYTES = 2**16
MAX_STATEMENT_BYTES = 2**16
MAX_PATTERN_BYTES = 200
"""Of LIKE and GLOB, whose time grows with the product of pattern and text."""
MAX_FUNCTIONS = 100
"""In one statement."""
MAX_COLUMNS = 200
MAX_TEMPORARY_BYTES = 256 * 2**20
"""That a statement writes, for sorting, to files on the host's disk."""
STEPS_BETWEEN_CHECKS = 100
SECONDS_BETWEEN_LOOKS = 0.01
"""At what a statement has written."""
REFUSED_ACTIONS = frozenset({sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA})

P = ParamSpec("P")
R = TypeVar("R")
Value = str | int | float | None
Contents = dict[str, tuple[list[str], list[str]]]
"""Of each table its columns, and its rows as text, sorted."""


class Column(BaseModel, extra="forbid"):
    """A column; `type` is SQLite's, and TEXT where it is left out."""

    name: str
    type: str = Field(default="TEXT", pattern=r"^[A-Za-z]*( COLLATE NOCASE)?$")


class Table(BaseModel, extra="forbid"):
    """A table with its rows, in the order of its columns."""

    name: str = Field(min_length=1)
    columns: list[Column] = Field(min_length=1)
    rows: list[list[Value]] = []

    @model_validator(mode="after")
    def _rows_have_all_columns(self) -> Table:
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} of the table {self.name!r} has {len(row)} values, not {len(self.columns)}"
                )
        return self


class SqlDatabase:
    """The tables of one started task. Statements run one at a time, in a thread of their own."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tables
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="task-sql")
        self._connection: sqlite3.Connection | None = None
        self._is_closed = False
        self._deadline = 0.0
        self._next_look = 0.0
        self._max_written = 0
        self._num_functions = 0

    async def execute(self, statement: str) -> str:
        """Run one statement; return its rows as text, or how many rows it changed.

        Raises:
            ToolError: SQLite refuses it, or it takes too long.
        """
        return await self._run(self._execute, statement)

    async def contents(self) -> Contents:
        """Return all rows of all tables, whatever their order. Raises: ToolError if they cannot be read."""
        return await self._run(self._read_contents)

    async def contents_after(self, statement: str) -> Contents:
        """Return the contents that there would be if `statement` alone had been run. Raises: ToolError."""
        fresh = SqlDatabase(self._tables)
        try:
            await fresh.execute(statement)
            return await fresh.contents()
        finally:
            await fresh.close()

    async def digest(self) -> str:
        """Return AgentBench's digest of the tables. Other tables may have the same: it leaves NULL out, and joins the
        values of a row by commas."""
        return await self._run(self._digest)

    async def close(self) -> None:
        """Forget the database, without waiting for the statement that runs; it is stopped."""
        self._is_closed = True
        self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args, **kwargs))

    def _open(self) -> sqlite3.Connection:
        """Return the connection; the first call fills the tables."""
        if self._connection is not None:
            return self._connection
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        connection.execute(f"PRAGMA max_page_count = {MAX_BYTES // PAGE_BYTES}")
        for table in self._tables:
            columns = ", ".join(f"{_quote(column.name)} {column.type}" for column in table.columns)
            connection.execute(f"CREATE TABLE {_quote(table.name)} ({columns})")
            marks = ", ".join("?" * len(table.columns))
            connection.executemany(f"INSERT INTO {_quote(table.name)} VALUES ({marks})", table.rows)
        # Only now: making the tables needs what a policy may not do.
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_STATEMENT_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, MAX_PATTERN_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
        connection.text_factory = _decode
        connection.set_authorizer(self._authorize)
        connection.set_progress_handler(self._must_stop, STEPS_BETWEEN_CHECKS)
        self._connection = connection
        return connection

    def _begin(self) -> sqlite3.Connection:
        """Return the connection, with the limits of one statement, or of one reading of all tables, before it."""
        connection = self._open()
        self._deadline = time.monotonic() + STATEMENT_SECONDS
        self._max_written = _count_written_bytes() + MAX_TEMPORARY_BYTES
        self._num_functions = 0
        return connection

    def _must_stop(self) -> bool:
        now = time.monotonic()
        if self._is_closed or now > self._deadline:
            return True  # interrupts the statement
        if now < self._next_look:
            return False
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        return _count_written_bytes() > self._max_written

    def _authorize(
        self, action: int, subject: str | None, detail: str | None, schema: str | None, _: str | None
    ) -> int:
        self._num_functions += action == sqlite3.SQLITE_FUNCTION
        # A temporary table is a file, without a limit of pages; making one inserts into the schema `temp`.
        is_temporary = action == sqlite3.SQLITE_INSERT and schema == "temp"
        is_refused = action in REFUSED_ACTIONS or is_temporary or self._num_functions > MAX_FUNCTIONS
        return sqlite3.SQLITE_DENY if is_refused else sqlite3.SQLITE_OK

    def _execute(self, statement: str) -> str:
        connection = self._begin()
        try:
            cursor = connection.execute(statement)
            rows = _read_rows(cursor)
        # sqlite3.Warning: several statements in one text. OverflowError and ValueError: values that SQLite cannot hold.
        except (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError) as error:
            raise ToolError(f"{error}{_describe_limits(error)}") from None
        if cursor.description is None:
            return f"{max(cursor.rowcount, 0)} rows changed"
        cursor.close()
        return f"[{', '.join(rows)}]"

    def _read_contents(self) -> Contents:
        connection = self._begin()
        try:
            found = connection.execute(
                "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT GLOB 'sqlite_*'"
            )
            return {name: _read_table(connection, name) for (name,) in found.fetchall()}
        except sqlite3.Error as error:
            raise ToolError(f"the tables cannot be read: {error}") from None

    def _digest(self) -> str:
        """Return the digest that AgentBench's database tasks compare (arXiv 2308.03688): of each row the first five
        digits of an MD5, sorted, and the MD5 of those."""
        connection = self._begin()
        digests = []
        for table in self._tables:
            columns = ", ".join(_quote(column.name) for column in table.columns)
            try:
                rows = connection.execute(f"SELECT {columns} FROM {_quote(table.name)}").fetchall()
            except sqlite3.Error as error:  # the policy dropped or altered the table
                digests.append(str(error))
                continue
            joined = sorted(_md5(",".join(str(value) for value in row if value is not None))[:5] for row in rows)
            digests.append(_md5(",".join(joined)))
        return "_".join(sorted(digests))

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _read_table(connection: sqlite3.Connection, name: str) -> tuple[list[str], list[str]]:
    cursor = connection.execute(f"SELECT * FROM {_quote(name)}")
    return [column[0] for column in cursor.description], sorted(map(repr, cursor))


def _read_rows(cursor: sqlite3.Cursor) -> list[str]:
    """Return rows as text, up to about `MAX_RESULT_CHARS`."""
    rows, num_chars = list[str](), 0
    for row in cursor:
        rows.append(repr(row))
        num_chars += len(rows[-1])
        if num_chars > MAX_RESULT_CHARS:
            rows.append("...")
            break
    return rows


def _describe_limits(error: Exception) -> str:
    if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_INTERRUPT:
        return ""
    size = f"{MAX_TEMPORARY_BYTES // 2**20} MB of temporary files"
    return f"; a statement may take {STATEMENT_SECONDS:g} seconds and {size}"


def _count_written_bytes() -> int:
    """Return how much this thread has written to files; 0 where the system does not say."""
    try:
        lines = Path("/proc/thread-self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.removeprefix("wchar:")) for line in lines if line.startswith("wchar:"))


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")  # CAST makes texts of any bytes


def _quote(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


def _md5(text: str) -> str:
    return hashlib.md5(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
