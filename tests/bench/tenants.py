"""Thousands of tenants, each with a few memories: the index's memory, open files, Chroma collections, query times.

All are indexed in one process through `Memory` as a server does, with a cheap encoder of 384 dimensions. A row of the
table is written each time the number of tenants has doubled, so that growth with tenants shows.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from sqlalchemy import insert
from sqlmodel import Session

from memory.config import MemoryConfig
from memory.schema import Document, Outbox, Passage, new_id
from memory.search.indexed_rows import COLLECTIONS
from memory.store import Memory
from tests.bench.measure import Spread, make_parser, print_table, write_json
from tests.bench.soak import read_memory

DIM = 384
NUM_QUESTIONS = 200
PATIENT = MemoryConfig(retrieval_deadline_seconds=10, encoding_deadline_seconds=10)


class RandomEncoder:
    """Returns a deterministic vector for each text, at negligible cost."""

    name = "random"

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        rows = [numpy.random.default_rng(hash(text) % 2**32).normal(size=DIM) for text in texts]
        vectors = numpy.asarray(rows, dtype="float32")
        return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)


async def add_tenants(memory: Memory, numbers: range, num_memories: int) -> None:
    """Write rows of one-passage documents directly: `Documents` would wait for the disk for each."""
    documents: list[dict[str, Any]] = []
    passages: list[dict[str, Any]] = []
    for number in numbers:
        for each in range(num_memories):
            document_id, text = new_id("doc"), f"Invoice {each} of customer {number} is due."
            document = Document(id=document_id, tenant=f"tenant{number}", title=f"Note {each}", digest=document_id)
            documents.append(document.model_dump())
            passages.append({"id": new_id("psg"), "document_id": document_id, "position": 0, "text": text})
    outbox = [{"collection": "passages", "row_id": row["id"]} for row in passages]

    def write(session: Session) -> None:
        for table, rows in ((Document, documents), (Passage, passages), (Outbox, outbox)):
            session.execute(insert(table), rows)

    await memory.database.write(write)


async def ask(memory: Memory, num_tenants: int) -> Spread:
    choose, seconds = random.Random(num_tenants), []
    for _ in range(NUM_QUESTIONS):
        number = choose.randrange(num_tenants)
        began = time.monotonic()
        found = await memory.index.find("passages", f"customer {number} invoice", tenant=f"tenant{number}")
        seconds.append(time.monotonic() - began)
        assert found
    return Spread.of(seconds)


def num_collections(memory: Memory) -> int:
    return sum(len(memory.index._vector_index._all(name)) for name in COLLECTIONS)


async def measure(directory: Path, num_tenants: int, num_memories: int) -> list[dict[str, Any]]:
    rows, done, wanted = [], 0, max(1, num_tenants // 16)
    with Memory.open(directory, PATIENT, encoder=RandomEncoder()) as memory:
        await memory.policies.register_base("base")
        await memory.index.drain(timeout_seconds=600)
        while done < num_tenants:
            began = time.monotonic()
            await add_tenants(memory, range(done, wanted), num_memories)
            await memory.index.drain(timeout_seconds=3600)
            seconds, done = time.monotonic() - began, wanted
            wanted = min(num_tenants, 2 * wanted)
            spread = await ask(memory, done)
            gc.collect()
            rows.append(
                {
                    "tenants": done,
                    "rss_mb": round(read_memory(os.getpid())["VmRSS"]),
                    "files": len(os.listdir("/proc/self/fd")),
                    "chroma_collections": num_collections(memory),
                    "p50_ms": round(spread.p50 * 1e3, 2),
                    "p99_ms": round(spread.p99 * 1e3, 2),
                    "without_meanings": memory.index.num_without_vectors,
                    "seconds": round(seconds, 1),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tenants", type=int, default=5_000)
    parser.add_argument("--memories", type=int, default=3, help="documents of each tenant")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as directory:
        rows = asyncio.run(measure(Path(directory), given.tenants, given.memories))
    print_table(f"{given.tenants} tenants of {given.memories} memories each", rows)
    conditions = {"tenants": given.tenants, "memories": given.memories, "dim": DIM}
    write_json(given.json, "tenants", rows, conditions=conditions)


if __name__ == "__main__":
    main()
