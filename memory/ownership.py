"""One owner for one data directory: a lock that dies with its process, and a refusal that names the owner.

This module refuses to know what is in the directory. Invariant: the kernel holds the lock, so a crash never leaves
a stale one.
"""

from __future__ import annotations

import fcntl
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from memory.errors import DataDirectoryInUse, StorageError

LOCK_NAME = "owner.lock"
ADDRESS = re.compile(r" at (https?://\S+)$")


def take_ownership(data_dir: Path) -> IO[str]:
    """Make the directory if need be and lock it; hold on to what is returned, and close it to give the directory up.

    Raises: DataDirectoryInUse at once when another process has it; StorageError when it can't be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / LOCK_NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot use the data directory {str(data_dir)!r}: {error.strerror}; choose another"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        address = ADDRESS.search(owner)
        raise DataDirectoryInUse(
            f"data directory {str(data_dir)!r} is in use by {owner}: stop it, or choose another directory",
            url=address and address[1],
        ) from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
    lock.flush()
    return lock


def tell_address(lock: IO[str], url: str) -> None:
    """Let whoever finds the directory taken know where its owner answers."""
    lock.write(f" at {url}")
    lock.flush()
