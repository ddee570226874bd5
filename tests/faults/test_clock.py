"""A clock that jumps, back or forth: what is newest stays newest, and nothing ends before it began."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memory import schema
from memory.schema import RewardSource, new_id, now
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder, open_trajectory, play

DAY, YEAR = 86_400, 365 * 86_400


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        yield memory


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`jump(seconds)` sets the clock of the rows so much forth, or back."""
    ahead_ns, real = 0, time.time_ns
    monkeypatch.setattr(schema, "_latest_ns", 0)  # what is jumped to here is nobody's past afterwards
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
    assert [view.trajectory.id for view in memory.trajectories.list()] == [third.id, second.id, first.id]


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
