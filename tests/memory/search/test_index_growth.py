"""The memory of an index that grows row by row is proportional to its rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory.grown_child import DIM

NUM_ROWS = 500
OVERHEAD = 6
"""Factor on the size of the vectors, for ids, metadata, links, and the pages of Chroma's database."""


LARGEST_COMPARISONS_MB = 18.0
"""The caches of four connections take 11; a prepared statement for each number of rows makes it 27."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the heap is read from /proc")


def grow(directory: Path, act: str, num: int) -> float:
    """Return how much the heap of a process grew by `num` operations, in MB."""
    command = [sys.executable, "-m", "tests.memory.grown_child", str(directory / "index"), act, str(num)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)


def test_rows_that_come_one_by_one_cost_little_more_than_their_vectors(tmp_path: Path):
    assert grow(tmp_path, "add", NUM_ROWS) < OVERHEAD * NUM_ROWS * DIM * 4 / 1e6


def test_comparisons_of_many_numbers_of_rows_keep_few_statements(tmp_path: Path):
    assert grow(tmp_path, "compare", 1500) < LARGEST_COMPARISONS_MB
