"""A backup taken under writes restores to one moment, and holds every row acknowledged before it."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from memory.schema import Step, StepKind
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder, open_trajectory

NUM_WRITERS = 32
NUM_BETWEEN = 200
"""Minimum number of rows that are written between two copies."""


def back_up(source: Path, copy: Path) -> None:
    """Copy as docs/operations.md says: by SQLite's backup, from outside the process that writes."""
    with closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as theirs, closing(sqlite3.connect(copy)) as ours:
        theirs.backup(ours)


async def write_until(memory: Memory, done: asyncio.Event, acknowledged: dict[str, int]) -> None:
    """Append steps to one episode, and count the acknowledged ones."""
    trajectory = await open_trajectory(memory)
    while not done.is_set():
        position = acknowledged.get(trajectory.id, 0)
        step = Step(trajectory_id=trajectory.id, position=position, kind=StepKind.TOOL, content="dusty " * 50)
        await memory.trajectories.append(step, trajectory=trajectory)
        acknowledged[trajectory.id] = position + 1


async def back_up_under_writes(
    memory: Memory, directory: Path, num_copies: int, pause_seconds: float
) -> tuple[list[dict[str, int]], float]:
    """Return the acknowledged steps at the start of each copy, and the rows written per second."""
    done, acknowledged, before = asyncio.Event(), {}, []
    began = time.monotonic()
    async with asyncio.TaskGroup() as writing:
        for _ in range(NUM_WRITERS):
            writing.create_task(write_until(memory, done, acknowledged))
        for number in range(num_copies):
            num_before = sum(acknowledged.values())
            await asyncio.sleep(pause_seconds)
            while sum(acknowledged.values()) < num_before + NUM_BETWEEN:
                await asyncio.sleep(0.01)
            before.append(dict(acknowledged))
            await asyncio.to_thread(back_up, memory.data_dir / "ratchet.db", directory / f"copy{number}.db")
        seconds = time.monotonic() - began
        done.set()
    return before, sum(acknowledged.values()) / seconds


@pytest.mark.parametrize(
    ("num_copies", "pause_seconds"), [(3, 0.0), pytest.param(60, 1.0, marks=pytest.mark.slow)], ids=["short", "full"]
)
async def test_a_copy_taken_under_writes_holds_one_moment(tmp_path: Path, num_copies: int, pause_seconds: float):
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        before, per_second = await back_up_under_writes(memory, tmp_path, num_copies, pause_seconds)
    print(f"{num_copies} copies under {per_second:.0f} writes/s")  # a quiet machine reaches 1,000 and more
    for number, acknowledged in enumerate(before):
        restored = tmp_path / f"restored{number}"
        restored.mkdir()
        (tmp_path / f"copy{number}.db").rename(restored / "ratchet.db")
        with Memory.open(restored, PATIENT, encoder=HashingEncoder()) as memory:
            assert memory.database.check() == []
            for trajectory_id, num_steps in acknowledged.items():
                positions = [step.position for step in memory.trajectories.steps(trajectory_id)]
                assert positions == list(range(len(positions))) and len(positions) >= num_steps
    assert any(before[-1].values())
