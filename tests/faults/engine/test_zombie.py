"""A dead or hanging engine is detected and restarted with its adapters, while its callers wait."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from memory.config import MemoryConfig
from memory.schema import TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, EngineConfig
from runtime.engine.process import Engine
from runtime.serving.hotswap import HotSwap
from tests.faults.support import played_child
from tests.memory.episodes import HashingEncoder
from tests.runtime.conftest import base_dir, write_adapter
from tests.support.rollouts import play
from tests.support.waiting import wait_until

__all__ = ["base_dir"]

ASK = [{"role": "user", "content": "hi"}]
FOUND_SECONDS = 10.0
Start = Callable[..., Awaitable[tuple[Engine, Agent, Memory]]]


@pytest.fixture
async def start(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """`await start(**settings)`: a watched fake engine with two adapters, the newer one active."""
    monkeypatch.setattr("runtime.engine.process.CHILD", Path(played_child.__file__))
    undo: list[Callable] = []

    async def begin(**settings) -> tuple[Engine, Agent, Memory]:
        memory = Memory.open(tmp_path / "data", MemoryConfig(memory_tokens=0), encoder=HashingEncoder())
        undo.append(memory.close)
        engine = Engine(EngineConfig(model=str(base_dir), **settings), tmp_path / "data")
        await engine.start()
        watching = asyncio.create_task(engine.watch())
        undo.extend([engine.stop, watching.cancel])
        await memory.policies.register_base("base")
        hotswap = HotSwap(memory.policies, engine)
        for version in (1, 2):
            path = write_adapter(tmp_path / f"pocket-v{version}", base_dir, version)
            await memory.policies.draft(adapter_path=str(path), parent=0)
            await hotswap.activate(version)
        return engine, Agent(memory, hotswap, {}, AgentConfig(max_seconds=60.0)), memory

    yield begin
    for step in reversed(undo):
        ended = step()
        if asyncio.iscoroutine(ended):
            await ended


def test_the_pause_and_the_time_of_a_probe_are_ten_seconds_together():
    settings = EngineConfig()
    assert settings.probe_interval_seconds + settings.probe_timeout_seconds <= FOUND_SECONDS


@pytest.mark.parametrize("how", ["dead", "zombie"])
async def test_it_is_started_again_with_its_adapters_and_nobody_notices(start: Start, how: str):
    engine, agent, memory = await start(probe_interval_seconds=0.05, probe_timeout_seconds=1.5)
    worn, before = await engine.client.adapters(), engine.pid
    assert worn == {"pocket-v1", "pocket-v2"}
    os.kill(before, signal.SIGUSR1 if how == "zombie" else signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        is_alive = True
        while is_alive:
            async with asyncio.timeout(0.2):
                is_alive = await engine.client.probe()
    episodes = [asyncio.create_task(play(agent, messages=ASK)) for _ in range(8)]
    if how == "dead":
        await wait_until(lambda: len(memory.trajectories.select()) == 8)
        with contextlib.suppress(ProcessLookupError):  # a slow machine may have restarted it already
            os.kill(before, signal.SIGKILL)
    played = await asyncio.gather(*episodes)

    assert {(it.stage, it.answer, it.policy) for it in played} == {(TrajectoryStage.FINISHED, "hello", 2)}
    assert engine.num_restarts >= 1 and engine.pid != before
    assert await engine.client.adapters() == worn
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


@pytest.mark.slow
async def test_a_zombie_is_found_within_ten_seconds(start: Start):
    engine, agent, _ = await start()
    waits = []
    for turn in range(8):
        await asyncio.sleep(turn * 0.3)  # hang at different times between two probes
        began = time.monotonic()
        os.kill(engine.pid, signal.SIGUSR1)
        await wait_until(lambda: not engine.is_ready)
        waits.append(time.monotonic() - began)
        await engine.wait_until_ready(60)
        assert await engine.client.adapters() == {"pocket-v1", "pocket-v2"}
        assert (await play(agent, messages=ASK)).stage is TrajectoryStage.FINISHED
    print("found after", " ".join(f"{wait:.2f}" for wait in waits), "seconds")
    assert max(waits) <= FOUND_SECONDS
