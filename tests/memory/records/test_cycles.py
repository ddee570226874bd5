"""Learning cycles as rows."""

from __future__ import annotations

import pytest

from memory.errors import CycleInProgress, IllegalMove, UnknownCycle
from memory.records.cycles import Cycles
from memory.schema import CycleStage
from memory.storage.database import Database


@pytest.fixture
def cycles(database: Database) -> Cycles:
    return Cycles(database)


async def test_one_cycle_at_a_time(cycles: Cycles):
    first = await cycles.open({"num_tasks": 8})
    assert cycles.unfinished() == first
    with pytest.raises(CycleInProgress, match=f"{first.id}.*'collect'"):
        await cycles.open({})
    await cycles.save(first.id, stage=CycleStage.COMPLETED, verdict={"outcome": "promote"})
    assert cycles.unfinished() is None
    second = await cycles.open({})
    assert [cycle.id for cycle in cycles.select()] == [second.id, first.id]


async def test_artifacts_add_up_and_the_rest_is_replaced(cycles: Cycles):
    cycle = await cycles.open({})
    await cycles.save(cycle.id, artifacts={"sft": "/a"}, progress={"num_done": 1, "num_total": 2})
    await cycles.save(cycle.id, stage="dpo", artifacts={"dpo": "/b"}, progress={"num_done": 2})
    kept = cycles.get(cycle.id)
    assert (kept.artifacts, kept.progress, kept.stage) == ({"sft": "/a", "dpo": "/b"}, {"num_done": 2}, "dpo")
    assert kept.closed_at is None


async def test_a_closed_cycle_never_changes(cycles: Cycles):
    cycle = await cycles.open({})
    closed = await cycles.save(cycle.id, stage=CycleStage.ERROR, error="TrainerError: died")
    assert closed.closed_at is not None
    with pytest.raises(IllegalMove, match="ended as 'error'"):
        await cycles.save(cycle.id, stage=CycleStage.COMPLETED)
    with pytest.raises(UnknownCycle, match="'cyc_none'"):
        await cycles.save("cyc_none", progress={})
    with pytest.raises(UnknownCycle, match="'cyc_none'"):
        cycles.get("cyc_none")
    with pytest.raises(ValueError, match="no \\['closed_at'\\] to save"):
        await cycles.save(cycle.id, closed_at=None)
