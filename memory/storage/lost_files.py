"""Notices that the rows' file, or the log beside it, was lost while no process had the directory open.

SQLite makes a new file in the place of one that is missing or empty, and asks for no log that is missing: what was
acknowledged would be gone, and nobody would be told. So a small file beside it says that there is a database, and
whether a process has it open. Invariant: it is written only when that is so.
"""

from __future__ import annotations

import os
from pathlib import Path

from memory.errors import StorageError

TRACE_SUFFIX = ".state"
OPEN, CLOSED = "open\n", "closed\n"


class DatabaseTrace:
    """What is known of one SQLite file besides itself."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._log = database.with_name(f"{database.name}-wal")
        self._trace = database.with_name(f"{database.name}{TRACE_SUFFIX}")

    def check(self) -> None:
        """Raise StorageError where the file or its log is gone; call it before SQLite makes new ones."""
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
        """Keep, durably, that the database exists and a process has it open."""
        self._write(OPEN)

    def note_closed(self) -> None:
        """Keep that its log is not needed, if SQLite has indeed done away with it."""
        if not self._log.exists():
            self._write(CLOSED)

    def _write(self, state: str) -> None:
        new = self._trace.with_name(f"{self._trace.name}-new")
        with new.open("w") as file:
            file.write(state)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._trace)
