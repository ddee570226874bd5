"""Row order survives jumps of the system clock, and nothing ends before it began."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlmodel import SQLModel

from memory import schema
from memory.records.exemplar_corrections import find_corrections, is_approved_since
from memory.schema import (
    CycleStage,
    Feedback,
    RewardSource,
    Step,
    StepKind,
    StoredVerdict,
    Trajectory,
    TrajectoryStage,
    UtcDateTime,
    new_id,
    now,
)
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder, open_trajectory, play
from tests.memory.records.test_exemplar_corrections import talk

DAY, YEAR = 86_400, 365 * 86_400


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        yield memory


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`jump(seconds)` moves the clock of the rows forward, or back if negative."""
    ahead_ns, real = 0, time.time_ns
    monkeypatch.setattr(schema, "_latest_sequence", 0)  # restored afterwards: later tests must not see these times
    monkeypatch.setattr(schema.time, "time_ns", lambda: real() + ahead_ns)

    def set_ahead(seconds: float) -> None:
        nonlocal ahead_ns
        ahead_ns += int(seconds * 1e9)

    return set_ahead


@pytest.mark.parametrize("seconds", [-DAY, YEAR, -YEAR])
async def test_what_came_last_counts_whatever_the_clock_says(memory: Memory, jump: Callable, seconds: float):
    first = await play(memory, episode_id="e", reward=None)
    await memory.trajectories.reward(first.id, 1.0, RewardSource.USER)
    jump(seconds)
    await memory.trajectories.reward(first.id, 0.0, RewardSource.USER)
    assert memory.trajectories.effective_reward(first.id) == 0.0
    second = await play(memory, episode_id="e")
    assert memory.trajectories.newest_of("e", tenant="").id == second.id
    jump(-2 * seconds)
    third = await play(memory, episode_id="e")
    assert [view.trajectory.id for view in memory.trajectories.select()] == [third.id, second.id, first.id]


async def test_an_episode_does_not_end_before_it_began(memory: Memory, jump: Callable):
    trajectory = await open_trajectory(memory)
    jump(-DAY)
    await memory.trajectories.close_orphans()
    closed = memory.trajectories.get(trajectory.id)
    assert closed.closed_at > closed.opened_at
    assert memory.database.check() == []


def test_no_two_moments_are_the_same_and_the_time_is_true():
    moments = [now() for _ in range(1_000)]
    assert moments == sorted(set(moments))
    assert abs(moments[-1].timestamp() - time.time()) < 60
    assert new_id("trj") < new_id("trk")


HOUR = 3_600
NUM_EPISODES = 40


async def test_an_hour_back_no_feedback_by_episode_goes_to_the_older_trajectory(memory: Memory, jump: Callable):
    await memory.trajectories.close_orphans()
    jump(-HOUR)
    for number in range(NUM_EPISODES):
        await play(memory, episode_id=f"e{number}", reward=None)
        newer = await play(memory, episode_id=f"e{number}", reward=None)
        assert memory.trajectories.newest_of(f"e{number}", tenant="").id == newer.id


async def test_a_process_that_starts_an_hour_back_puts_its_rows_behind_those_that_are_there(
    tmp_path: Path, jump: Callable, monkeypatch: pytest.MonkeyPatch
):
    data, said = tmp_path / "restarted", {"name": "reward", "correction": "Better."}
    with Memory.open(data, PATIENT, encoder=HashingEncoder()) as memory:
        first = await play(memory, episode_id="e", reward=None)
        await memory.trajectories.reward(first.id, 1.0, RewardSource.USER)
        await memory.feedback.post(Feedback(trajectory_id=first.id, id="z", **said | {"correction": "Old words."}))
        cycle = await memory.cycles.open({})
        await memory.cycles.save(cycle.id, stage=CycleStage.COMPLETED)
    jump(-HOUR)
    monkeypatch.setattr(schema, "_latest_sequence", 0)  # as in a new process
    with Memory.open(data, PATIENT, encoder=HashingEncoder()) as memory:
        await memory.trajectories.reward(first.id, 0.0, RewardSource.USER)
        await memory.feedback.post(Feedback(trajectory_id=first.id, id="a", **said))
        newest = await play(memory, episode_id="e", reward=None)
        again = await memory.cycles.open({})

        assert memory.trajectories.newest_of("e", tenant="").id == newest.id
        assert memory.trajectories.effective_reward(first.id) == 0.0
        assert [each.id for each in memory.feedback.select(first.id)] == ["z", "a"]
        assert [each.text for each in memory.feedback.corrections(limit=9)] == ["Better."]
        assert [each.id for each in memory.cycles.select()] == [again.id, cycle.id]


async def test_no_row_of_a_process_that_starts_an_hour_back_is_older_than_those_that_are_there(
    tmp_path: Path, jump: Callable, monkeypatch: pytest.MonkeyPatch
):
    data = tmp_path / "restarted"
    with Memory.open(data, PATIENT, encoder=HashingEncoder()) as memory:
        await memory.policies.register_base("pocket")
        await memory.keys.note_use((await memory.keys.create("ann", ["admin"]))[0])
        for stage in (TrajectoryStage.FINISHED, TrajectoryStage.FAILED):
            await play(memory, stage=stage)
        corrected = await talk(memory, "On May 9.", user_id="", is_shared=True)
        left_open = await open_trajectory(memory)
        step = Step(trajectory_id=left_open.id, position=0, kind=StepKind.MODEL, content="...")
        await memory.trajectories.append(step, trajectory=left_open)
        await memory.verdicts.open(StoredVerdict(id="old", candidate=0, incumbent=0), choose_alpha=float)
        await memory.reviews.approve_exemplar(corrected.id, tenant="")
        cycle = await memory.cycles.open({})
        await memory.cycles.save(cycle.id, stage=CycleStage.COMPLETED)
        newest = newest_times(memory)
    jump(-HOUR)
    monkeypatch.setattr(schema, "_latest_sequence", 0)  # as in a new process
    with Memory.open(data, PATIENT, encoder=HashingEncoder()) as memory:
        moment = now()
        assert {name: at for name, at in newest.items() if at >= moment} == {}
        # an old approval, candidate and cycle do not pass for newer than what comes now
        await memory.feedback.post(Feedback(trajectory_id=corrected.id, correction="A stranger's.", user_id="john"))
        assert not is_approved_since(memory.trajectories.get(corrected.id), corrections_of(memory, corrected)[0])
        played = await play(memory)
        assert [it.trajectory.id for it in memory.trajectories.learnable(since=cycle.created_at)][-1] == played.id
        since = memory.policies.get(0).created_at
        assert played.id in {view.trajectory.id for view in memory.trajectories.select(since=since)}
        await memory.verdicts.open(StoredVerdict(id="new", candidate=0, incumbent=0), choose_alpha=float)
        assert [verdict.id for verdict in memory.verdicts.select()] == ["new", "old"]


def newest_times(memory: Memory) -> dict[str, datetime]:
    """Return the newest time in each column of every table."""
    newest = {}
    with memory.database.read() as session:
        for table in SQLModel.metadata.sorted_tables:
            for column in table.columns:
                if isinstance(column.type, UtcDateTime):
                    newest[str(column)] = session.scalar(select(func.max(column)))
    return {name: at for name, at in newest.items() if at is not None}


def corrections_of(memory: Memory, trajectory: Trajectory) -> list[Feedback]:
    with memory.database.read() as session:
        return find_corrections(session, trajectory.id)


def test_a_clock_that_was_ahead_is_caught_up_with_and_time_goes_on_until_then(
    jump: Callable, monkeypatch: pytest.MonkeyPatch
):
    passed_ns, real = 0, time.monotonic_ns
    monkeypatch.setattr(schema.time, "monotonic_ns", lambda: real() + passed_ns)
    ahead = now()
    jump(-HOUR)
    before = now()
    assert timedelta(0) < before - ahead < timedelta(minutes=1)
    passed_ns = int(HOUR * 1e9)
    jump(HOUR)
    assert now() - before > timedelta(minutes=29)
    passed_ns *= 3
    jump(2 * HOUR)
    assert abs(now().timestamp() - schema.time.time_ns() / 1e9) < 60


def test_ids_and_numbers_are_in_order_within_one_moment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schema.time, "time_ns", lambda: 1)  # the clock stands still
    monkeypatch.setattr(schema, "_latest_sequence", 10**15)
    ids = [new_id("trj") for _ in range(3_000)]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    assert all(schema.sequence_of(row_id) > 10**15 for row_id in ids)
