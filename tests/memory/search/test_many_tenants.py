"""Many small tenants share one Chroma collection, large ones have their own, and no tenant finds another's rows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memory.search import index as index_module
from memory.search import vector_index as vector_module
from memory.search.indexed_rows import COLLECTIONS
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder

NUM_TENANTS = 30


def num_chroma_collections(memory: Memory) -> int:
    return sum(len(memory.index._vector_index._all(name)) for name in COLLECTIONS)


async def add_tenants(memory: Memory, first: int, last: int) -> None:
    for number in range(first, last):
        text = f"fry mark{number} on the stove"
        await memory.documents.ingest("Stove", text, tenant=f"tenant{number}")
    await memory.index.drain()


async def found_by_meaning(memory: Memory, query: str, tenant: str) -> list[str]:
    num_before = memory.index.num_without_vectors
    found = await memory.retrieval.find_passages(query, 50, tenant=tenant)
    assert memory.index.num_without_vectors == num_before
    return found


async def test_more_tenants_need_neither_more_collections_nor_more_files(memory: Memory):
    await add_tenants(memory, 0, 3)
    before, num_files = num_chroma_collections(memory), len(os.listdir("/proc/self/fd"))
    await add_tenants(memory, 3, NUM_TENANTS)
    assert num_chroma_collections(memory) == before == 1
    for number in (0, 7, NUM_TENANTS - 1):
        (found,) = await found_by_meaning(memory, "where to fry", f"tenant{number}")
        assert f"mark{number} " in found
    assert len(os.listdir("/proc/self/fd")) <= num_files + 8


@pytest.fixture
def few_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vector_module, index_module):
        monkeypatch.setattr(module, "MAX_COMPARED", 5)


async def ingest(memory: Memory, tenant: str, first: int, last: int) -> None:
    for number in range(first, last):
        await memory.documents.ingest(f"Note {number}", f"fry {tenant} {number}", tenant=tenant)
    await memory.index.drain()


async def test_a_tenant_that_has_grown_large_moves_and_loses_no_row(memory: Memory, few_compared: None):
    await ingest(memory, "large", 0, 5)
    await ingest(memory, "small", 0, 3)
    assert num_chroma_collections(memory) == 1
    await ingest(memory, "large", 5, 12)
    assert num_chroma_collections(memory) == 2
    shared = memory.index._vector_index._all("passages")[vector_module.SHARED]
    assert shared.count() == 3
    assert len(await found_by_meaning(memory, "fry", "large")) == 12
    assert len(await found_by_meaning(memory, "fry", "small")) == 3
    assert len(memory.index._vector_index.digests("passages")) == 15


async def test_more_large_tenants_than_have_collections_of_their_own_are_found_by_their_newest_rows(
    memory: Memory, few_compared: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vector_module, "MAX_LARGE", 2)
    for number in range(6):
        await ingest(memory, f"tenant{number}", 0, 8)
    assert num_chroma_collections(memory) == 3
    assert len(await found_by_meaning(memory, "fry", "tenant0")) == 8
    assert len(await found_by_meaning(memory, "fry", "tenant5")) >= 5
    assert len(memory.index._vector_index.digests("passages")) == 48


async def test_a_move_that_died_halfway_is_healed_at_the_next_start(tmp_path: Path, few_compared: None):
    with Memory.open(tmp_path / "moved", PATIENT, encoder=HashingEncoder()) as memory:
        await ingest(memory, "large", 0, 5)
        vector_index = memory.index._vector_index
        memory.index._sync.stop()
        # The process dies when the collection exists, and has one row of five.
        held = vector_index._create("passages", ("large", "", ""))
        row = vector_index._all("passages")[vector_module.SHARED].get(limit=1, include=["embeddings", "metadatas"])
        held.upsert(ids=row["ids"], embeddings=row["embeddings"], metadatas=row["metadatas"])
    with Memory.open(tmp_path / "moved", PATIENT, encoder=HashingEncoder()) as memory:
        await memory.index.drain()
        assert len(await found_by_meaning(memory, "fry", "large")) == 5
        counts = {place: held.count() for place, held in memory.index._vector_index._all("passages").items()}
        assert counts == {vector_module.SHARED: 0, ("large", "", ""): 5}
