"""A kill at every named point of log, train, promote, rollback, swap: the next boot finds a policy that answers."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from memory.schema import TrajectoryStage
from tests.faults.support.children import Child
from tests.faults.support.points import POINTS, Point
from tests.faults.support.turns import boot, turn_until_killed
from tests.runtime.fake_engine import FakeEngine, say

NUM_TIMES = 5
SHORT = {  # one of each operation, between two steps that belong together
    "log: Database._write_forever: _resolve(batch)",
    "train: write_adapter_atomically: _sync(final.parent)",
    "promote: _retire: session.flush()",
    "rollback: Policies.rollback: _activate(session, policy",
    "swap: HotSwap.activate: await self._probe(",
}


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    """A base model with only the files from which a recipe is chosen."""
    directory = tmp_path / "base"
    directory.mkdir()
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (directory / "config.json").write_text(json.dumps({**kind, **sizes}))
    save_file({"weight": numpy.ones((2, 2), "float32")}, directory / "model.safetensors")
    return directory


@pytest.fixture
async def fake(base_dir: Path) -> AsyncIterator[FakeEngine]:
    """A fake engine that outlives the killed processes."""
    async with FakeEngine(say("hello"), base_dir=base_dir) as fake:
        yield fake


async def die_and_boot(point: Point, num_passes: int, data_dir: Path, base_dir: Path, fake: FakeEngine) -> None:
    """Let a child die at a point, boot on its data, check them, and run one more turn."""
    child = Child(turn_until_killed, data_dir, base_dir, fake.url, point, num_passes)
    exit_code = await asyncio.to_thread(child.join)
    assert exit_code == -signal.SIGKILL
    turns = await boot(child.told.append, data_dir, base_dir, fake.url)
    with turns.memory as memory:
        assert turns.flaws() == []
        assert await turns.act() == memory.policies.active().version
        changes = [(words[1], words[2]) for words in child.told if words[0] == "active"]
        activations = memory.policies.activations()
        assert [activations[number - 1].version for number, _ in changes] == [version for _, version in changes]
        logged = [words[1] for words in child.told if words[0] == "logged"]
        stages = {memory.trajectories.get(trajectory_id).stage for trajectory_id in logged}
        assert stages <= {TrajectoryStage.FINISHED}
        turns.tell = lambda *words: None
        await turns.turn()
        assert turns.flaws() == [] and memory.cycles.unfinished() is None
    await turns.engine.stop()
    await turns.engine.client.close()


def test_there_are_forty_points_and_each_is_one_line():
    assert len({(point.function.__code__, point.line) for point in POINTS}) == len(POINTS) >= 40
    assert {point.name for point in POINTS} >= SHORT


@pytest.mark.parametrize("point", [pytest.param(it, id=it.name) for it in POINTS if it.name in SHORT])
async def test_after_death_at_a_point_of_each_kind_the_active_policy_acts(
    point: Point, tmp_path: Path, base_dir: Path, fake: FakeEngine
):
    await die_and_boot(point, 2, tmp_path / "data", base_dir, fake)


@pytest.mark.slow
@pytest.mark.parametrize("point", [pytest.param(it, id=it.name) for it in POINTS])
async def test_after_death_at_every_point_five_times_the_active_policy_acts(
    point: Point, tmp_path: Path, base_dir: Path, fake: FakeEngine
):
    for num_passes in range(1, NUM_TIMES + 1):
        await die_and_boot(point, num_passes, tmp_path / "data", base_dir, fake)
