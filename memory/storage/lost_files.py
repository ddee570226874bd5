"""Detects that the database file, or its write-ahead log, was lost while no process had the directory open.

SQLite silently creates a new file in place of a missing or empty one, and ignores a missing log: acknowledged writes
would be lost unnoticed. So a small file beside the database records that it exists, and whether a process has it open.

Invariant: the record is written only after the state that it describes is true.
"""

from __future__ import annotations

import os
from pathlib import Path

from memory.errors import StorageError

TRACE_SUFFIX = ".state"
OPEN, CLOSED = "open\n", "closed\n"


class DatabaseTrace:
    """The record beside one SQLite file."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._log = database.with_name(f"{database.name}-wal")
        self._trace = database.with_name(f"{database.name}{TRACE_SUFFIX}")

    def check(self) -> None:
        """Raises: StorageError when the file or its log is missing. Call it before SQLite creates new ones."""
        if not self._trace.exists():
            return
        if not self._database.exists() or not self._database.stat().st_size:
            what = "is empty" if self._database.exists() else "is missing"
            raise StorageError(
                f"the database {str(self._database)!r} {what}, but this directory has had one: restore a backup, or "
                f"delete {str(self._trace)!r} to begin with an empty one"
            )
        if self._trace.read_text() == OPEN and not self._log.exists():
            raise StorageError(
                f"{str(self._log)!r} is missing: the last process was killed, and what it wrote last is in that file "
                f"alone. Restore it, or a backup. If another program opened the database since, which may have moved "
                f"all into {self._database.name!r}, or to go on with what that holds, delete {str(self._trace)!r}"
            )

    def note_open(self) -> None:
        """Record, durably, that the database exists and a process has it open."""
        self._write(OPEN)

    def note_closed(self) -> None:
        """Record that the log is not needed, if SQLite has deleted it."""
        if not self._log.exists():
            self._write(CLOSED)

    def _write(self, state: str) -> None:
        # flushed before it is renamed: otherwise a power cut may leave the new name with an empty file
        new = self._trace.with_name(f"{self._trace.name}-new")
        with new.open("w") as file:
            file.write(state)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._trace)  # atomic: a crash leaves the old record or the new one
