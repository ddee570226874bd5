"""Swaps under load on the fake engine: no episode fails or mixes two policies, and one call undoes a swap."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from memory.config import MemoryConfig
from memory.schema import TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, EngineConfig
from runtime.engine.client import Delta
from runtime.engine.process import Engine
from runtime.serving.hotswap import HotSwap
from runtime.tools.base import Tool
from tests.memory.episodes import HashingEncoder
from tests.runtime.conftest import base_dir, write_adapter
from tests.runtime.fake_engine import FakeEngine, Reply, call, say
from tests.support.rollouts import play

__all__ = ["base_dir"]

NUM_POLICIES = 6
NUM_LOOKS = 2
FLIP_SECONDS = 0.05


class World:
    """An agent, and an engine that records which models answered each episode."""

    def __init__(self, memory: Memory, fake: FakeEngine, hotswap: HotSwap) -> None:
        self.memory, self.fake, self.hotswap = memory, fake, hotswap
        self.served: dict[str, set[str]] = defaultdict(set)
        self.acting: set[str] = set()
        """The models that have answered since the last swap."""
        fake.script = self.play
        tool = Tool("look", "Look around.", {"type": "object", "properties": {}}, self.look)
        self.agent = Agent(memory, hotswap, {}, AgentConfig(), tools=[tool])

    async def look(self, arguments: dict[str, Any]) -> str:
        return "nothing"

    async def play(self, request: dict[str, Any]) -> Reply:
        messages = request["messages"]
        self.served[messages[0]["content"]].add(request["model"])
        self.acting.add(request["model"])
        await asyncio.sleep(0.002)
        is_done = sum(message["role"] == "tool" for message in messages) == NUM_LOOKS
        return Reply("seen", pause_seconds=0.001) if is_done else call("look")

    async def stream(self, name: str, done: asyncio.Event) -> None:
        async def listen(delta: Delta) -> None:
            pass

        number = 0
        while not done.is_set():
            ask = [{"role": "user", "content": f"{name}-{number}"}]
            await play(self.agent, messages=ask, on_delta=listen, episode_id=f"{name}-{number}")
            number += 1


@pytest.fixture
async def world(tmp_path: Path, base_dir: Path) -> AsyncIterator[World]:
    config = MemoryConfig(memory_tokens=0)
    with Memory.open(tmp_path / "data", config, encoder=HashingEncoder()) as memory:
        async with FakeEngine(say(""), base_dir=base_dir) as fake:
            engine = Engine(EngineConfig(url=fake.url), tmp_path)
            await engine.start()
            await memory.policies.register_base("base")
            for version in range(1, NUM_POLICIES + 1):
                path = write_adapter(tmp_path / f"pocket-v{version}", base_dir, version)
                await memory.policies.draft(adapter_path=str(path), parent=0)
            hotswap = HotSwap(memory.policies, engine)
            await hotswap.activate(0)
            yield World(memory, fake, hotswap)
            await engine.stop()


@pytest.mark.parametrize(("num_swaps", "num_streams"), [(14, 8), pytest.param(500, 32, marks=pytest.mark.slow)])
async def test_swaps_under_streams_fail_nobody_and_mix_nothing(world: World, num_swaps: int, num_streams: int):
    done = asyncio.Event()
    streams = [asyncio.create_task(world.stream(f"stream-{number}", done)) for number in range(num_streams)]
    for swap in range(num_swaps):
        version = 1 + swap % NUM_POLICIES
        await world.hotswap.activate(version)
        while f"pocket-v{version}" not in world.acting:  # each policy serves at least one request
            await asyncio.sleep(0.002)
        world.acting.clear()
    done.set()
    await asyncio.gather(*streams)

    played = [view.trajectory for view in world.memory.trajectories.select(limit=1_000_000)]
    assert {it.stage for it in played} == {TrajectoryStage.FINISHED}
    names = {version: f"pocket-v{version}" for version in range(1, NUM_POLICIES + 1)} | {0: "base"}
    assert [it.id for it in played if world.served[it.episode_id] != {names[it.policy]}] == []
    assert {it.policy for it in played} == names.keys() and world.hotswap.num_swaps == num_swaps + 1
    print(f"{len(played)} episodes during {num_swaps} swaps: 0 failed, 0 mixed")


@pytest.mark.parametrize(
    ("num_rollbacks", "is_alone"), [(5, False), pytest.param(200, True, marks=pytest.mark.slow)], ids=["short", "full"]
)
async def test_a_rollback_to_a_resident_policy_is_a_flip_that_loads_nothing(
    world: World, num_rollbacks: int, is_alone: bool
):
    """The full count needs an idle machine and limits wall time; the short one limits the process's CPU time."""
    following = asyncio.create_task(world.hotswap.follow())
    waits, worked = [], []

    async def see(version: int) -> None:
        async with asyncio.timeout(20):
            while world.hotswap.active_version != version:
                await asyncio.sleep(0)

    await world.memory.policies.promote(1)
    await see(1)
    for _ in range(num_rollbacks):
        await world.memory.policies.promote(2)
        await see(2)
        began, worked_before = time.monotonic(), time.process_time()
        assert (await world.memory.policies.rollback()).version == 1
        await see(1)
        waits.append(time.monotonic() - began)
        worked.append(time.process_time() - worked_before)
    following.cancel()
    assert world.fake.ever_loaded == ["pocket-v1", "pocket-v2"]
    waits.sort()
    assert waits[-1] < FLIP_SECONDS if is_alone else sorted(worked)[len(worked) // 2] < FLIP_SECONDS
    print(f"row to flip: {waits[len(waits) // 2] * 1e3:.1f} ms (median), {waits[-1] * 1e3:.1f} ms (worst)")
