"""Files of rows are read one row at a time, and each bad line is named."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from memory.formats.files import MAX_LINE_BYTES, dump_line, parse_line, read_file

ROWS = [{"question": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("form", ["lines", "array", "indented array", "windows lines"])
def test_lines_and_arrays_hold_the_same_rows(tmp_path: Path, form: str, is_compressed: bool):
    text = {
        "lines": LINES,
        "array": json.dumps(ROWS),
        "indented array": json.dumps(ROWS, indent=2),
        "windows lines": "\ufeff" + LINES.replace("\n", "\r\n\r\n"),
    }[form]
    path = tmp_path / "rows"
    data = text.encode()
    path.write_bytes(gzip.compress(data) if is_compressed else data)
    read = list(read_file(path))
    assert [each.row for each in read] == ROWS and read[-1].position >= path.stat().st_size - 4


def test_a_bad_line_is_named_and_the_next_ones_are_read(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    bad = [b'{"a": ', b"[1]", b'{"a": "\xff"}', b"null", b"[" * 5000]
    path.write_bytes(b'{"n": 1}\n\n' + b"\n".join(bad) + b'\n{"n": 8}')
    read = list(read_file(path))
    assert [each.row for each in read if each.row] == [{"n": 1}, {"n": 8}]
    errors = {each.number: each.error for each in read if each.error}
    assert list(errors) == [3, 4, 5, 6, 7]
    for error, complaint in zip(errors.values(), ("no JSON", "is list", "not UTF-8", "is null", ""), strict=True):
        assert complaint in error


def test_a_line_that_is_too_long_is_left_out_alone(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * (2 * MAX_LINE_BYTES) + b'"}\n{"n": 2}\n')
    first, second = read_file(path)
    assert "longer than" in (first.error or "") and (second.number, second.row) == (2, {"n": 2})


def test_a_broken_array_and_a_torn_archive_end_with_an_error(tmp_path: Path):
    array, archive = tmp_path / "rows.json", tmp_path / "rows.jsonl.gz"
    array.write_text('[{"n": 1}, {"n": }]')
    archive.write_bytes(gzip.compress(LINES.encode())[:-400])
    for path, complaint in ((array, "no JSON from here on"), (archive, "cut off or damaged")):
        *_, last = read_file(path)
        assert complaint in (last.error or "") and last.row is None


def test_reading_needs_the_memory_of_a_row_not_of_a_file(tmp_path: Path):
    path = tmp_path / "rows.json"
    row = json.dumps({"question": "x" * 2_000, "answer": "y"})
    path.write_text("[" + ",".join([row] * 5_000) + "]")  # ten megabytes
    tracemalloc.start()
    assert sum(1 for _ in read_file(path)) == 5_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_row_is_one_line_to_everybody():
    row = {"text": "a\u2028b\x85c\u2029d \N{EM DASH} \ud800"}
    for text in (row, {"text": row["text"][:-1]}):
        line = dump_line(text)
        assert len(line.decode().splitlines()) == 1 and parse_line(line) == text
    assert "\N{EM DASH}" in dump_line({"text": "\N{EM DASH}"}).decode()
