"""Adds rows one at a time to a vector index and prints how much the heap of this process grew, in MB.

It runs in a process of its own, because the allocator keeps memory that earlier code has used.
`python -m tests.memory.grown_child DIR NUM`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy

from memory.search.indexed_rows import IndexedRow
from memory.search.vector_index import VectorIndex

DIM = 384
NUM_PERSONS = 50


def heap_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def add(index: VectorIndex, numbers: range) -> None:
    random = numpy.random.default_rng(numbers.start)
    for number in numbers:
        vector = random.standard_normal(DIM).astype("float32")
        row = IndexedRow(f"trj_{number:08}", "text", "", "chat", "", tenant="", user_id=f"p{number % NUM_PERSONS}")
        index.upsert("exemplars", [row], [vector / numpy.linalg.norm(vector)], newest_ids=lambda _partition, _num: [])


def main() -> None:
    index = VectorIndex(Path(sys.argv[1]), "random")
    index.open()
    add(index, range(150))  # opening Chroma and its caches take some megabytes
    before = heap_mb()
    add(index, range(150, 150 + int(sys.argv[2])))
    print(heap_mb() - before)
    index.close()


if __name__ == "__main__":
    main()
