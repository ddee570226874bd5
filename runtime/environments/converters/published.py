"""Reads files as benchmarks publish them: JSON lines, plain or compressed, or a list, in a folder or alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SkippedTask:
    """A published task that does not become one here; the reason begins with its file and line."""

    reason: str


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


def read_json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, item) of the list that a JSON file holds, or of the one object.

    Raises:
        ValueError: it is not JSON; the message names the line.
    """
    text = path.read_text(encoding="utf-8")
    decoder, position = json.JSONDecoder(), _skip_space(text, 0)
    is_list = text[position : position + 1] == "["
    position = _skip_space(text, position + is_list)
    while position < len(text) and text[position] != "]":
        line = text.count("\n", 0, position) + 1
        try:
            item, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise ValueError(f"{path}:{line} is not JSON: {error}") from None
        yield line, item
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
    if is_list and text[position:].strip() != "]":
        raise ValueError(f"{path} is not JSON: the list is not closed, or something stands behind it")


def _skip_space(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip())


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
