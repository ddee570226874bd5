"""Histograms, and the code that fills them."""

from __future__ import annotations

import asyncio

from memory.schema import CycleStage, Split
from memory.storage.histogram import BOUNDS, Histogram
from memory.store import Memory
from tests.memory.episodes import play


def test_a_duration_is_in_the_bucket_that_ends_with_it():
    tally = Histogram()
    for seconds in (0.0, BOUNDS[0], BOUNDS[-1], BOUNDS[-1] + 1):
        tally.add(seconds)
    assert (tally.counts[0], tally.counts[-2], tally.counts[-1], tally.count) == (2, 1, 1, 4)


async def test_every_write_that_got_to_the_disk_is_timed(memory: Memory):
    before = memory.database.acknowledgements.count
    await asyncio.gather(*(memory.database.write(lambda session: None) for _ in range(5)))
    assert memory.database.acknowledgements.count - before >= 5
    assert memory.database.acknowledgements.total_seconds > 0


async def test_the_stages_of_a_question_are_timed(memory: Memory):
    await play(memory)
    await memory.index.drain()
    await memory.retrieval.retrieve(environment="kitchen", kind="cooking", query_text="a meal")
    counts = {stage: tally.count for stage, tally in memory.retrieval.seconds.items()}
    assert counts["all"] == counts["insights"] == counts["exemplars"] == counts["passages"] == 1
    assert counts["words"] >= 1


async def test_trajectories_are_counted_by_how_they_ended(memory: Memory):
    await play(memory)
    await play(memory)
    assert memory.trajectories.num_closed == {("finished", Split.PRACTICE): 2}


async def test_the_time_in_each_stage_of_a_cycle_is_kept(memory: Memory):
    cycle = await memory.cycles.open({})
    for stage in (CycleStage.COLLECT, "sft"):
        await memory.cycles.save(cycle.id, stage=stage)
    assert memory.cycles.outcomes() == []
    await memory.cycles.save(cycle.id, stage=CycleStage.COMPLETED, verdict={"decision": "promote"})
    assert set(memory.cycles.stage_seconds) == {CycleStage.COLLECT, "sft"}
    assert memory.cycles.outcomes() == [(CycleStage.COMPLETED, {"decision": "promote"})]
