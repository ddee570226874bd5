"""SIGKILL in the middle of everything: what was acknowledged is there, once, and whole."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from memory.database import Database
from memory.schema import Step
from memory.trajectories import Trajectories

ROOT = Path(__file__).parents[2]
NUM_TASKS = 16
WRITER = f"""
import asyncio, sys
from pathlib import Path
from memory.database import Database
from memory.policies import Policies
from memory.schema import RewardSource, Step, StepKind, Trajectory, TrajectoryStage, new_id
from memory.trajectories import Trajectories

database = Database(Path(sys.argv[1]))
trajectories = Trajectories(database)

def acknowledge(*words):
    print(*words, flush=True)

async def live():
    while True:
        trajectory = await trajectories.open(Trajectory(id=new_id("trj"), episode_id="e", policy=0))
        acknowledge("open", trajectory.id)
        for position in range(4):
            ids = [position] * 50
            step = Step(trajectory_id=trajectory.id, position=position, kind=StepKind.MODEL, prompt_token_ids=ids)
            await trajectories.append(step, trajectory=trajectory)
            acknowledge("step", trajectory.id, position)
        await trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED, answer="done")
        acknowledge("close", trajectory.id)
        await trajectories.reward(trajectory.id, 1.0, RewardSource.ENVIRONMENT)
        acknowledge("reward", trajectory.id)

async def main():
    await Policies(database).register_base("pocket")
    await trajectories.close_orphans()
    acknowledge("ready")
    await asyncio.gather(*(live() for _ in range({NUM_TASKS})))

asyncio.run(main())
"""


def write_until_killed(path: Path, num_lines: int) -> list[list[str]]:
    """Run a writer, kill it in the middle of things, and return what it had acknowledged."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        first = child.stdout.readline()
        if first != "ready\n":
            raise AssertionError(child.stderr.read())
        said = "".join(child.stdout.readline() for _ in range(num_lines))
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read()
    # The last line may be cut short by the kill: then it was not acknowledged.
    return [line.split() for line in said.splitlines(keepends=True) if line.endswith("\n")]


def missing(path: Path, acknowledged: list[list[str]]) -> list[list[str]]:
    """Return what was acknowledged and isn't in the file, and check that what is there is whole."""
    database = Database(path)
    try:
        assert database.check() == []
        trajectories = Trajectories(database)
        steps: dict[str, list[Step]] = {}
        for _, trajectory_id, *_ in acknowledged:
            if trajectory_id not in steps:
                steps[trajectory_id] = trajectories.steps(trajectory_id)
                positions = [step.position for step in steps[trajectory_id]]
                assert positions == list(range(len(positions)))
                assert all(step.prompt_token_ids == [step.position] * 50 for step in steps[trajectory_id])
        return [
            line
            for line in acknowledged
            if (line[0] == "step" and len(steps[line[1]]) <= int(line[2]))
            or (line[0] == "close" and trajectories.get(line[1]).closed_at is None)
            or (line[0] == "reward" and len(trajectories.rewards(line[1])) != 1)
        ]
    finally:
        database.close()


def kill_again_and_again(path: Path, num_kills: int) -> int:
    acknowledged: list[list[str]] = []
    for number in range(num_kills):
        acknowledged += write_until_killed(path, random.Random(number).randint(5, 150))
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()
    assert missing(path, acknowledged) == []
    return len(acknowledged)


def test_every_acknowledged_row_survives_five_kills(tmp_path: Path):
    assert kill_again_and_again(tmp_path / "ratchet.db", 5) > 50


@pytest.mark.slow
def test_every_acknowledged_row_survives_two_hundred_kills(tmp_path: Path):
    assert kill_again_and_again(tmp_path / "ratchet.db", 200) > 1000
