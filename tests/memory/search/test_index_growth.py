"""The memory of an index that grows row by row is in proportion to its rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory.grown_child import DIM

NUM_ROWS = 500
OVERHEAD = 6
"""Times the size of the vectors: ids, metadata, links, and the pages of Chroma's own database."""


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is read from /proc")
def test_rows_that_come_one_by_one_cost_little_more_than_their_vectors(tmp_path: Path):
    command = [sys.executable, "-m", "tests.memory.grown_child", str(tmp_path / "index"), str(NUM_ROWS)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    assert grown < OVERHEAD * NUM_ROWS * DIM * 4 / 1e6
