"""Reads files as benchmarks publish them: JSON lines, plain or compressed, in a folder or alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, `.gz` or plain.

    Raises:
        ValueError: a line is not JSON; the message names it.
    """
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from None


def list_files(source: Path, pattern: str) -> list[Path]:
    """Return `source` itself if it is a file, else the files in it that match, by name.

    Raises:
        ValueError: there is none.
    """
    if source.is_file():
        return [source]
    found = sorted(source.glob(pattern))
    if not found:
        raise ValueError(f"{str(source)!r} holds no file {pattern!r}")
    return found
