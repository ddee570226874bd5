"""An engine starved of processor time is not restarted; one whose core is stopped is, even then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from runtime.engine.activity import PROC, ProcessActivity, is_held_up, read_activity
from runtime.engine.process import Engine
from tests.faults.support import starved_child
from tests.runtime.conftest import base_dir

__all__ = ["base_dir"]

FOUND_SECONDS = 10.0
NUM_RIVALS = 6
LOWEST = 19
"""The nice value of the lowest priority."""
FULL = {"probe_interval_seconds": 2.0, "probe_timeout_seconds": 7.5}
SHORT = {"probe_interval_seconds": 0.1, "probe_timeout_seconds": 1.5}
Start = Callable[[dict[str, float]], Awaitable[Engine]]

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this kernel does not say who waits for the processor"
)


@pytest.fixture
async def start(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """`await start(settings)`: a watched engine of two processes."""
    monkeypatch.setattr("runtime.engine.process.CHILD", Path(starved_child.__file__))
    async with contextlib.AsyncExitStack() as undo:

        async def begin(settings: dict[str, float]) -> Engine:
            engine = Engine(EngineConfig(model=str(base_dir), **settings), tmp_path / "data")
            await engine.start()
            watching = asyncio.create_task(engine.watch())
            undo.push_async_callback(engine.stop)
            undo.callback(watching.cancel)
            return engine

        yield begin


@contextlib.contextmanager
def starving(engine: Engine) -> Iterator[None]:
    """Pin the engine to one processor, beside rivals of higher priority."""
    cpu = max(os.sched_getaffinity(0))
    for pid in read_activity(engine.pid):
        for thread in os.listdir(PROC / str(pid) / "task"):
            os.sched_setaffinity(int(thread), {cpu})
            os.setpriority(os.PRIO_PROCESS, int(thread), LOWEST)
    group = PROC / str(engine.pid) / "autogroup"
    if group.exists():  # autogroup divides time between sessions, whatever the nice values of their processes
        group.write_text(str(LOWEST))
    rival = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    rivals = [subprocess.Popen([sys.executable, "-c", rival], start_new_session=True) for _ in range(NUM_RIVALS)]
    try:
        yield
    finally:
        for process in rivals:
            process.kill()
            process.wait()


def core_of(engine: Engine) -> int:
    (core,) = read_activity(engine.pid).keys() - {engine.pid}
    return core


@pytest.mark.parametrize(
    ("settings", "seconds"), [(SHORT, 12.0), pytest.param(FULL, 120.0, marks=pytest.mark.slow)], ids=["short", "full"]
)
async def test_a_starved_engine_is_waited_for_and_answers_when_it_may(
    start: Start, settings: dict[str, float], seconds: float
):
    engine = await start(settings)
    pid, looks = engine.pid, []
    with starving(engine):
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            await asyncio.sleep(0.1)
            looks.append(engine._stalled_since is not None)
            assert engine.is_ready and engine.num_restarts == 0
    if not any(looks):
        pytest.skip("the scheduler of this machine let the engine run beside its rivals: nothing was late")
    async with asyncio.timeout(60):
        while not await engine.client.probe():
            await asyncio.sleep(0.1)
    assert (engine.pid, engine.num_restarts) == (pid, 0)
    print(f"starved for {seconds:g} s: no token in {sum(looks) / len(looks):.0%} of the looks, no restart")


@pytest.mark.parametrize("settings", [SHORT, pytest.param(FULL, marks=pytest.mark.slow)], ids=["short", "full"])
@pytest.mark.parametrize("is_starved", [False, True], ids=["idle", "starved"])
async def test_a_stopped_core_is_found_within_ten_seconds(start: Start, settings: dict[str, float], is_starved: bool):
    engine = await start(settings)
    pid = engine.pid
    with starving(engine) if is_starved else contextlib.nullcontext():
        os.kill(core_of(engine), signal.SIGSTOP)
        began = time.monotonic()
        while engine.is_ready:
            await asyncio.sleep(0.01)
            assert time.monotonic() - began < FOUND_SECONDS
    print(f"found after {time.monotonic() - began:.2f} s")
    await engine.wait_until_ready(60)
    assert engine.num_restarts == 1 and engine.pid != pid


def test_an_engine_that_runs_in_circles_is_not_held_up_and_one_that_waits_is():
    def activity(ran: float, waited: float) -> dict[int, ProcessActivity]:
        return {1: ProcessActivity("S", {1: (0.0, 0.0)}), 2: ProcessActivity("R", {2: (ran, waited)})}

    assert not is_held_up(activity(0, 0), activity(7.4, 0.1), 7.5)
    assert not is_held_up(activity(0, 0), activity(0.1, 0.2), 7.5)  # wakes up at times
    assert is_held_up(activity(0, 0), activity(0.2, 7.0), 7.5)
    assert not is_held_up(activity(0, 0), activity(0.2, 7.0), 7.5, without=2)
    assert not is_held_up({}, {}, 7.5)


async def test_a_core_that_is_stopped_during_a_look_is_found_in_it(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = Engine(EngineConfig(model=str(base_dir)), tmp_path / "data")
    server = [ProcessActivity("R", {1: (1.0, ran)}) for ran in (0.0, 7.0, 7.5)]  # other work keeps it in the queue
    looks = {"before": "S", "after": "T", "later": "T"}

    def look_at(ran: float) -> list[dict[int, ProcessActivity]]:
        core = [ProcessActivity(state, {2: (3.0, 1.0)}) for state in looks.values()]
        core[2] = ProcessActivity("T", {2: (3.0 + ran, 1.0)})
        return [{1: one, 2: other} for one, other in zip(server, core, strict=True)]

    async def is_held_up_after(ran: float) -> bool:
        before, *others = look_at(ran)

        async def read() -> dict[int, ProcessActivity]:
            return others.pop(0)

        monkeypatch.setattr(engine, "_read_activity", read)
        return await engine._is_held_up(before, time.monotonic() - 7.5, None)

    assert not await is_held_up_after(0.0)
    assert await is_held_up_after(0.1)  # throttled: it ran in between


def test_a_core_that_sleeps_is_stuck_unless_the_process_in_front_of_it_waits():
    before = {1: ProcessActivity("S", {1: (0.0, 0.0)}), 2: ProcessActivity("S", {2: (1.0, 0.0)})}
    after = {1: ProcessActivity("R", {1: (0.2, 7.0)}), 2: ProcessActivity("S", {2: (1.0, 0.0)})}
    assert is_held_up(before, after, 7.5)  # it may have passed nothing on to the core
    assert not is_held_up(before, after, 7.5, without=1)  # it answered


@pytest.mark.parametrize(("state", "expected"), [("R", True), ("S", False), ("T", False)])
def test_a_process_that_waited_in_the_queue_all_the_time_is_held_up_although_no_figure_grew(state: str, expected: bool):
    core = {2: ProcessActivity(state, {2: (3.0, 1.0), 3: (0.5, 0.0)})}
    assert is_held_up(core, core, 1.0) is expected
