"""Makes a data directory readable by its user only.

Hazard: the process's umask changes, for all files that it and its children create from then on.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

PRIVATE_UMASK = 0o077


def make_directory(data_dir: Path) -> None:
    """Create the directory where it is missing, after setting the umask to private."""
    os.umask(PRIVATE_UMASK)
    data_dir.mkdir(parents=True, exist_ok=True)


def make_private(data_dir: Path) -> None:
    """Remove other users' access to the directory and the files in it.

    A shared directory such as /tmp keeps its mode; files created in it are private because of the umask.
    """
    if not _is_ours(data_dir.stat()):
        return
    data_dir.chmod(0o700)
    for entry in os.scandir(data_dir):
        status = entry.stat(follow_symlinks=False)
        if _is_ours(status) and status.st_mode & 0o077 and not entry.is_symlink():
            os.chmod(entry.path, stat.S_IMODE(status.st_mode) & 0o700)


def _is_ours(status: os.stat_result) -> bool:
    # The sticky bit marks a directory that users share, such as /tmp.
    return status.st_uid == os.geteuid() and not status.st_mode & stat.S_ISVTX
