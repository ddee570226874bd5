"""Adds rows one by one to a vector index, or compares them, and prints how much the heap of this process grew, in MB.

It runs in a process of its own, because the allocator keeps memory that earlier code has used.
`python -m tests.memory.grown_child DIR (add|compare) NUM`.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy

from memory.search.indexed_rows import IndexedRow, IndexQuery
from memory.search.vector_index import VectorIndex

DIM = 384
NUM_PERSONS = 50
NUM_BEFORE = 150


def heap_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def add(index: VectorIndex, numbers: range) -> None:
    random = numpy.random.default_rng(numbers.start)
    for number in numbers:
        vector = random.standard_normal(DIM).astype("float32")
        row = IndexedRow(f"trj_{number:08}", "text", "", "chat", "", tenant="", user_id=f"p{number % NUM_PERSONS}")
        index.upsert("exemplars", [row], [vector / numpy.linalg.norm(vector)], newest_ids=lambda _partition, _num: [])


def compare(index: VectorIndex, numbers: range) -> None:
    """Compare with 1, 2, ... up to `NUM_BEFORE` rows, from several threads as a server does."""
    query = IndexQuery("exemplars", "text", {"tenant": "", "user_id": "p0"}, 10, None)
    vector = numpy.ones(DIM, dtype="float32")

    def compare_some(number: int) -> None:
        index.compare(query, vector, [f"trj_{row:08}" for row in range(number % NUM_BEFORE + 1)])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(compare_some, numbers))


def main() -> None:
    index = VectorIndex(Path(sys.argv[1]), "random")
    index.open()
    add(index, range(NUM_BEFORE))  # Chroma and its caches take some megabytes at first
    compare(index, range(1))
    before = heap_mb()
    act = {"add": add, "compare": compare}[sys.argv[2]]
    act(index, range(NUM_BEFORE, NUM_BEFORE + int(sys.argv[3])))
    print(heap_mb() - before)
    index.close()


if __name__ == "__main__":
    main()
