"""A window without the engine: drained before, probed after, and closed however it ends. The engine's process is a
fake, started, ended and watched like the real one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from memory.config import MemoryConfig
from memory.schema import TrajectoryStage, now
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, EngineConfig
from runtime.engine.process import Engine
from runtime.errors import EngineError, EngineInMaintenance
from runtime.maintenance import Maintenance
from runtime.serving.hotswap import HotSwap
from tests.faults.support import played_child
from tests.memory.episodes import HashingEncoder
from tests.runtime.conftest import write_adapter
from tests.runtime.fake_engine import LOOK
from tests.support.rollouts import play
from tests.support.waiting import wait_until

SAY_HI = [{"role": "user", "content": "hi"}]


@dataclass
class Running:
    engine: Engine
    hotswap: HotSwap
    agent: Agent
    memory: Memory
    maintenance: Maintenance
    watching: asyncio.Task[None]


@pytest.fixture
async def running(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """A watched engine with two adapters, the newer one active."""
    monkeypatch.setattr("runtime.engine.process.CHILD", Path(played_child.__file__))
    with Memory.open(tmp_path / "data", MemoryConfig(memory_tokens=0), encoder=HashingEncoder()) as memory:
        engine = Engine(EngineConfig(model=str(base_dir), probe_interval_seconds=0.05), tmp_path / "data")
        await engine.start()
        watching = asyncio.create_task(engine.watch())
        await memory.policies.register_base("base")
        hotswap = HotSwap(memory.policies, engine)
        for version in (1, 2):
            path = write_adapter(tmp_path / f"pocket-v{version}", base_dir, version)
            await memory.policies.draft(adapter_path=str(path), parent=0)
            await hotswap.activate(version)
        agent = Agent(memory, hotswap, {}, AgentConfig(max_seconds=60.0, client_idle_seconds=30.0))
        maintenance = Maintenance(engine, hotswap, agent.open_episodes, drain_seconds=20.0)
        yield Running(engine, hotswap, agent, memory, maintenance, watching)
        await engine.stop()
        watching.cancel()
        await asyncio.wait({watching})


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def require_back(running: Running, before: int) -> None:
    """Assert that a new engine process answers with the active policy, and has the same adapters."""
    await running.engine.wait_until_ready(30)
    assert running.engine.pid not in (None, before)
    assert await running.engine.client.adapters() == {"pocket-v1", "pocket-v2"}
    trajectory = await play(running.agent, messages=SAY_HI)
    assert (trajectory.stage, trajectory.policy, trajectory.answer) == (TrajectoryStage.FINISHED, 2, "hello")
    assert running.maintenance.reason is None


async def test_in_a_window_the_engine_is_gone_and_after_it_back_with_its_adapters(running: Running):
    before = running.engine.pid
    async with running.maintenance.window("training"):
        assert not is_alive(before) and running.engine.pid is None and not running.engine.is_ready
        with pytest.raises(EngineInMaintenance, match="training"):
            await play(running.agent, messages=SAY_HI)
        assert running.memory.trajectories.select(limit=10) == []
    assert running.engine.is_ready and running.engine.num_restarts == 0
    await require_back(running, before)


async def test_what_is_under_way_is_finished_before_the_engine_stops(running: Running):
    before = running.engine.pid
    hanging = asyncio.create_task(play(running.agent, messages=[{"role": "user", "content": "hang"}]))
    await wait_until(lambda: running.hotswap.num_leases == 1)
    opened = asyncio.Event()

    async def work() -> None:
        async with running.maintenance.window("training"):
            opened.set()

    working = asyncio.create_task(work())
    await asyncio.sleep(0.3)
    assert is_alive(before) and running.engine.is_ready and not opened.is_set()
    with pytest.raises(EngineInMaintenance):  # no new turn meanwhile
        await play(running.agent, messages=SAY_HI)
    hanging.cancel()  # its client disconnects
    with contextlib.suppress(asyncio.CancelledError):
        await hanging
    await working
    assert opened.is_set()
    await require_back(running, before)


async def test_who_never_ends_holds_the_window_up_only_for_so_long(running: Running):
    running.maintenance._drain_seconds = 0.2
    hanging = asyncio.create_task(play(running.agent, messages=[{"role": "user", "content": "hang"}]))
    await wait_until(lambda: running.hotswap.num_leases == 1)
    before = running.engine.pid
    async with running.maintenance.window("training"):
        assert not is_alive(before)
    hanging.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await hanging
    await require_back(running, before)


async def test_a_training_that_fails_brings_the_engine_back(running: Running):
    before = running.engine.pid
    with pytest.raises(RuntimeError, match="out of memory"):
        async with running.maintenance.window("training"):
            raise RuntimeError("out of memory")
    await require_back(running, before)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 8, 20, None])
async def test_a_window_cancelled_at_any_moment_brings_the_engine_back(running: Running, num_steps: int | None):
    opened = asyncio.Event()

    async def work() -> None:
        async with running.maintenance.window("training"):
            opened.set()
            await asyncio.sleep(60)

    working = asyncio.create_task(work())
    if num_steps is None:
        await opened.wait()
    for _ in range(num_steps or 0):
        await asyncio.sleep(0)
    working.cancel()
    working.cancel()
    async with asyncio.timeout(1):  # no request waits for the engine here
        await asyncio.wait({working})
    assert working.cancelled() and running.maintenance.reason is None
    await wait_until(lambda: running.engine.is_ready and not running.engine._suspended.is_set())
    trajectory = await play(running.agent, messages=SAY_HI)
    assert (trajectory.stage, trajectory.policy) == (TrajectoryStage.FINISHED, 2)


async def test_a_window_that_follows_another_at_once_has_no_engine_either(running: Running):
    opened = asyncio.Event()

    async def work() -> None:
        async with running.maintenance.window("first"):
            opened.set()
            await asyncio.sleep(60)

    before, first = running.engine.pid, asyncio.create_task(work())
    await opened.wait()
    first.cancel()
    await asyncio.wait({first})
    async with running.maintenance.window("second"):
        await asyncio.sleep(0.5)
        assert running.engine.pid is None and not running.engine.is_ready
    await require_back(running, before)


async def test_a_second_window_waits_for_nobody_and_is_refused(running: Running):
    async with running.maintenance.window("first"):
        with pytest.raises(EngineInMaintenance, match="first"):
            async with running.maintenance.window("second"):
                pass
        assert running.maintenance.reason == "first" and running.engine.pid is None


async def test_a_server_stopped_meanwhile_starts_no_engine(running: Running):
    opened = asyncio.Event()

    async def work() -> None:
        async with running.maintenance.window("training"):
            opened.set()
            await asyncio.sleep(60)

    working = asyncio.create_task(work())
    await opened.wait()
    running.watching.cancel()  # in the order of `server_process.live`
    working.cancel()
    await asyncio.wait({running.watching, working})
    await running.engine.stop()
    await asyncio.sleep(0.3)
    assert running.engine.pid is None and not running.engine.is_ready


async def test_a_stop_of_the_engine_ends_the_wait_for_its_suspension(running: Running):
    running.watching.cancel()
    await asyncio.wait({running.watching})
    suspending = asyncio.create_task(running.engine.suspend())
    await asyncio.sleep(0.05)
    await running.engine.stop()
    with pytest.raises(EngineError, match="the engine was stopped"):
        await suspending


async def test_an_engine_that_died_as_the_window_opened_is_back_after_it(running: Running):
    before = running.engine.pid
    os.kill(before, signal.SIGKILL)
    async with running.maintenance.window("training"):
        assert running.engine.pid is None
        await asyncio.sleep(0.3)
        assert running.engine.pid is None
    await require_back(running, before)


async def test_what_waits_for_a_client_survives_a_window_longer_than_its_patience(running: Running):
    agent, book = running.agent, running.agent.open_episodes
    book._idle_seconds = 0.2
    asked = [{"role": "user", "content": "call"}]
    waiting = await play(agent, messages=asked, tools=[LOOK])
    assert waiting.stage is TrajectoryStage.RUNNING
    async with running.maintenance.window("training"):
        await asyncio.sleep(0.5)
        assert await book.sweep() == 0
    assert await book.sweep() == 0  # the time limit starts again
    call = running.memory.trajectories.steps(waiting.id)[-1].tool_calls
    reply = {"role": "assistant", "content": "", "tool_calls": call}
    result = {"role": "tool", "tool_call_id": call[0]["id"], "content": "rain"}
    ended = await play(agent, messages=[*asked, reply, result], tools=[LOOK])
    assert (ended.id, ended.stage, ended.policy) == (waiting.id, TrajectoryStage.FINISHED, 2)


async def test_after_a_window_idle_episodes_are_closed_as_ever(running: Running):
    book = running.agent.open_episodes
    book._idle_seconds = 0.2
    waiting = await play(running.agent, messages=[{"role": "user", "content": "call"}], tools=[LOOK])
    async with running.maintenance.window("training"):
        pass
    book._sweeps_from = now() - timedelta(seconds=1)
    assert await book.sweep() == 1
    assert running.memory.trajectories.get(waiting.id).stage is TrajectoryStage.FINISHED


async def test_an_engine_that_is_not_ours_cannot_be_stopped(engine: Engine, hotswap: HotSwap, agent: Agent):
    maintenance = Maintenance(engine, hotswap, agent.open_episodes, drain_seconds=1.0)
    with pytest.raises(EngineError, match="was not started here"):
        async with maintenance.window("training"):
            pass
    assert engine.is_ready and maintenance.reason is None
    assert (await play(agent, messages=SAY_HI)).stage is TrajectoryStage.FINISHED
