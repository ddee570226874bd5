"""Files that appear whole or not at all: after a crash the earlier one is there, or none."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in place of an earlier one. Raises: OSError."""
    # renamed at the end: who finds a file takes it for finished
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # before the rename: a power cut could otherwise leave the new name on an empty file
        os.fsync(file.fileno())
    unfinished.replace(path)
