"""Reads and writes files of rows, one row at a time: JSON lines, or one JSON array; also compressed with gzip.

Invariant: memory holds one row of a file, whatever its size.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import ijson

from memory.formats.content import BadRow, Row

MAX_LINE_BYTES = 8 * 2**20
"""Of one row. Longer ones are errors: a body of the server holds 16 MiB."""
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Valid inside of JSON, and ends of a line to Python's splitlines, and so to httpx: as escapes they are none to anybody.
SEPARATORS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


@dataclass(frozen=True)
class FileRow:
    """One row of a file, or the reason why it is none."""

    number: int
    """Of the line, from 1; in a JSON array, of the element."""
    row: Row | None
    error: str | None = None
    position: int = 0
    """Bytes of the file that are read so far; of a compressed one, compressed bytes."""


def dump_line(row: Row) -> bytes:
    """Return a row as one line of JSON in UTF-8, with its line feed."""
    try:
        line = json.dumps(row, ensure_ascii=False).translate(SEPARATORS).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        line = json.dumps(row).encode()
    return line + b"\n"


def parse_line(line: bytes) -> Row:
    """Return the row in one line. Raises: BadRow."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRow("the line is not UTF-8: convert the file first") from None
    except RecursionError:
        raise BadRow("the line is nested too deeply: flatten it") from None
    except ValueError as error:
        raise BadRow(f"the line is no JSON ({error}): write one object per line, or one array") from None
    return require_object(row)


def require_object(row: object) -> Row:
    """Return a parsed row. Raises: BadRow for anything but an object."""
    if not isinstance(row, dict):
        raise BadRow(f"the row is {'null' if row is None else type(row).__name__}: it must be an object")
    return cast(Row, row)


def read_file(path: Path) -> Iterator[FileRow]:
    """Yield each row of a file. A line that is no row is yielded with its error; where nothing can be read behind an
    error, it is the last.

    Raises: OSError for a file that cannot be opened.
    """
    with path.open("rb") as raw:
        is_compressed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        opened: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if is_compressed else raw
        number = 0
        try:
            rows = _read_array(opened, raw) if _begins_array(opened) else _read_lines(opened, raw)
            for each in rows:
                number = each.number
                yield each
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield FileRow(number + 1, None, f"the file is cut off or damaged ({error}): compress it again", raw.tell())


def _begins_array(opened: IO[bytes]) -> bool:
    """Return whether the first character is a bracket; the file is back at its start."""
    start = opened.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
    opened.seek(0)
    return start.startswith(b"[")


def _read_lines(opened: IO[bytes], raw: IO[bytes]) -> Iterator[FileRow]:
    number = 0
    while line := opened.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):  # the rest of it
                line = opened.readline(MAX_LINE_BYTES)
            yield FileRow(number, None, f"the line is longer than {MAX_LINE_BYTES} bytes: split it", raw.tell())
            continue
        text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if not text.strip():
            continue
        try:
            yield FileRow(number, parse_line(text), position=raw.tell())
        except BadRow as error:
            yield FileRow(number, None, str(error), raw.tell())


def _read_array(opened: IO[bytes], raw: IO[bytes]) -> Iterator[FileRow]:
    number = 0
    if opened.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
        opened.seek(0)
    elements: Iterator[Any] = ijson.items(opened, "item", use_float=True)
    while True:
        try:
            element = next(elements)
        except StopIteration:
            return
        except (ijson.JSONError, UnicodeDecodeError) as error:
            # a broken array has no place to go on from
            yield FileRow(number + 1, None, f"the array is no JSON from here on ({error})", raw.tell())
            return
        number += 1
        try:
            yield FileRow(number, require_object(element), position=raw.tell())
        except BadRow as error:
            yield FileRow(number, None, str(error), raw.tell())
