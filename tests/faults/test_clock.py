"""Row order survives jumps of the system clock, and nothing ends before it began."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memory import schema
from memory.schema import CycleStage, Feedback, RewardSource, new_id, now
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder, open_trajectory, play

DAY, YEAR = 86_400, 365 * 86_400


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        yield memory


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`jump(seconds)` moves the clock of the rows forward, or back if negative."""
    ahead_ns, real = 0, time.time_ns
    for clock in ("_latest_ns", "_latest_sequence"):  # restored afterwards: later tests must not see these times
        monkeypatch.setattr(schema, clock, 0)
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
    for clock in ("_latest_ns", "_latest_sequence"):
        monkeypatch.setattr(schema, clock, 0)  # as in a new process
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


def test_ids_and_numbers_are_in_order_within_one_moment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schema.time, "time_ns", lambda: 1)  # the clock stands still
    monkeypatch.setattr(schema, "_latest_sequence", 10**15)
    ids = [new_id("trj") for _ in range(3_000)]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    assert all(schema.sequence_of(row_id) > 10**15 for row_id in ids)
