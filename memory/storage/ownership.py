"""Locks a data directory for one process; a second process gets an error that names the owner.

The lock is on the directory itself, so that it cannot be deleted separately; a file inside names the owner.

Invariant: the kernel holds the lock, so a crash never leaves a stale one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path

from memory.errors import DataDirectoryInUse, StorageError
from memory.storage.private_files import make_directory, make_private

OWNER_NAME = "owner.lock"
OWNER_SECONDS = 0.3
ADDRESS = re.compile(r" at (https?://\S+)$")


class Ownership:
    """A locked data directory, until it is closed."""

    def __init__(self, data_dir: Path, lock: int) -> None:
        self._owner_file = data_dir / OWNER_NAME
        self._lock = lock
        self._description = f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        self._owner_file.write_text(self._description, encoding="utf-8")

    def set_address(self, url: str) -> None:
        """Record the owner's address, which a second process reports."""
        self._owner_file.write_text(f"{self._description} at {url}", encoding="utf-8")

    def close(self) -> None:
        """Release the directory."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def take_ownership(data_dir: Path) -> Ownership:
    """Create the directory where it is missing, make it private to its user, and lock it.

    Raises: DataDirectoryInUse at once when another process has it; StorageError when it cannot be written.
    """
    lock = -1
    try:
        make_directory(data_dir)
        # not inherited by programs that this process starts (PEP 446): an engine that outlives it does not keep the
        # lock
        lock = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY)
        # The kernel releases the lock when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        make_private(data_dir)
        return Ownership(data_dir, lock)
    except BlockingIOError as error:
        os.close(lock)
        owner = _read_owner(data_dir)
        address = ADDRESS.search(owner)
        raise DataDirectoryInUse(
            f"data directory {str(data_dir)!r} is in use by {owner}: stop it, or choose another directory",
            url=address and address[1],
        ) from error
    except OSError as error:
        if lock >= 0:
            os.close(lock)
        raise StorageError(
            f"cannot use the data directory {str(data_dir)!r}: {error.strerror}; choose another"
        ) from error


def _read_owner(data_dir: Path) -> str:
    """Return the description of the owner; one that has just taken the lock has `OWNER_SECONDS` to write it."""
    deadline = time.monotonic() + OWNER_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if owner := (data_dir / OWNER_NAME).read_text(encoding="utf-8").strip():
                return owner
        time.sleep(0.02)
    return "another process"
