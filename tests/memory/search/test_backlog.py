"""The order in which tenants' rows are indexed when one tenant adds many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest

from memory.config import MemoryConfig
from memory.schema import Outbox
from memory.search import backlog as backlog_module
from memory.search.backlog import Backlog, FairQueue, OutboxEntry
from memory.search.index_sync import VECTOR_BATCH
from memory.store import Memory
from tests.memory.episodes import HashingEncoder, add

FLOOD = "\n".join(f"# passage {number}" for number in range(2_000))


def entries(tenant: str | None, *ids: int) -> list[OutboxEntry]:
    return [OutboxEntry(each, "passages", f"psg_{each}", tenant) for each in ids]


def test_tenants_take_turns_and_a_batch_begins_with_whoever_had_none():
    queue = FairQueue()
    for entry in [*entries("flood", *range(10)), *entries("b", 20), *entries(None, 30, 31)]:
        queue.add(entry)
    assert [it.id for it in queue.take(4)] == [0, 20, 30, 1]
    assert [it.id for it in queue.take(3)] == [31, 2, 3]
    assert [it.id for it in queue.take(100)] == [4, 5, 6, 7, 8, 9]
    assert queue.take(1) == []


async def test_what_was_left_out_for_being_too_much_is_read_again(memory: Memory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backlog_module, "MAX_WAITING", 3)
    monkeypatch.setattr(backlog_module, "PAGE", 2)
    memory.index._sync.stop()
    rows = [
        Outbox(collection="passages", row_id=f"psg_{number}", is_in_text_index=number % 2 == 0) for number in range(20)
    ]
    await memory.database.write(lambda session: session.add_all(rows))
    seen: list[str] = []
    backlog = Backlog()
    for _ in range(40):
        with memory.database.read() as session:
            backlog.read(session)
        worded = backlog.take_for_text_index(2)
        backlog.queue_for_vector_index(worded)
        held = backlog.take_for_vector_index(2)
        seen += [it.row_id for it in held]

        def finish(session, worded=worded, held=held) -> None:
            for entry in worded:
                session.get_one(Outbox, entry.id).is_in_text_index = True
            session.flush()
            for entry in held:
                session.delete(session.get_one(Outbox, entry.id))

        await memory.database.write(finish)
    assert sorted(seen) == sorted(row.row_id for row in rows) and len(seen) == 20


class CountingEncoder(HashingEncoder):
    """Records the texts in the order of encoding."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        self.texts += texts
        time.sleep(0.002 * len(texts))  # slower than the writer
        return super().encode(texts)


async def test_one_tenants_flood_delays_anothers_row_by_two_batches_at_most(tmp_path: Path, config: MemoryConfig):
    encoder = CountingEncoder()
    with Memory.open(tmp_path / "flooded", config, encoder=encoder) as memory:
        await memory.policies.register_base("pocket")
        await memory.documents.ingest("Flood", FLOOD, tenant="flood")
        before = len(encoder.texts)
        await memory.documents.ingest("Stove", "How to fry.", tenant="acme")
        await memory.insights.apply([add("fry on the stove")])
        await memory.index.drain()
        for text in ("Stove: How to fry.", "fry on the stove"):
            assert encoder.texts.index(text) - before <= 2 * VECTOR_BATCH
        assert len(encoder.texts) > 2_000
