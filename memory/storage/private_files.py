"""A data directory that nobody but its owner may read.

Invariant: what this process makes from then on, and its children, is its user's alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

PRIVATE_UMASK = 0o077


def make_directory(data_dir: Path) -> None:
    """Make the directory if need be; whatever this process makes from now on, only its user can read."""
    os.umask(PRIVATE_UMASK)
    data_dir.mkdir(parents=True, exist_ok=True)


def make_private(data_dir: Path) -> None:
    """Close the directory and the files in it to other users.

    A directory that others share by its nature, as /tmp is, keeps its mode; what is made in it is private all the same.
    """
    if not _is_ours(data_dir.stat()):
        return
    data_dir.chmod(0o700)
    for entry in os.scandir(data_dir):
        about = entry.stat(follow_symlinks=False)
        if _is_ours(about) and about.st_mode & 0o077 and not entry.is_symlink():
            os.chmod(entry.path, stat.S_IMODE(about.st_mode) & 0o700)


def _is_ours(about: os.stat_result) -> bool:
    return about.st_uid == os.geteuid() and not about.st_mode & stat.S_ISVTX
