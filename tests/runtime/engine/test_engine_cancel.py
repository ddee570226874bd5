"""A start or restart of the engine can be cancelled at every await."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop

from runtime.config import EngineConfig
from runtime.engine.client import EngineClient
from runtime.engine.process import Engine

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
CHILD = """
import signal
print("Application startup complete", flush=True)
signal.pause()
"""


class CancelledAt:
    """Awaits a coroutine, and cancels its own task at the coroutine's `number`-th suspension.

    It cancels at once or, if `is_late`, between the end of the awaited future and the coroutine's next step, where
    Python 3.11's `asyncio.wait_for` swallows the cancellation.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], number: int, *, is_late: bool) -> None:
        self._coroutine = coroutine
        self._number = number
        self._is_late = is_late
        self.num_waits = 0
        self.has_cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        thrown: BaseException | None = None
        while True:
            try:
                awaited = self._coroutine.throw(thrown) if thrown else self._coroutine.send(None)
            except StopIteration as ended:
                return ended.value
            self.num_waits += 1
            if self.num_waits == self._number:
                self._cancel(awaited)
            thrown = None
            try:
                yield awaited
            except BaseException as error:  # passed on to the coroutine
                thrown = error

    def _cancel(self, awaited: asyncio.Future[Any] | None) -> None:
        task = asyncio.current_task()
        assert task is not None

        def cancel(_: Any = None) -> None:
            self.has_cancelled = True
            task.cancel()

        if self._is_late and awaited is not None:
            awaited.add_done_callback(cancel)  # before the task's own callback, which wakes it
        else:
            asyncio.get_running_loop().call_soon(cancel)


class PlayedClient(EngineClient):
    """A fake client: there is no server."""

    def __init__(self, engine: PlayedEngine) -> None:
        super().__init__()
        self._engine = engine

    async def probe(self, model: str | None = None) -> bool:
        await asyncio.sleep(0)
        return self._engine.num_restarts > 0 or not self._engine.is_zombie

    async def models(self) -> list[dict[str, Any]]:
        await asyncio.sleep(0)
        return [{"id": "base", "parent": None, "max_model_len": 4096}]

    async def num_tokens_so_far(self) -> float:
        await asyncio.sleep(0)
        return 7.0

    async def token_logprobs(self, model: str, token_ids: Sequence[int]) -> list[float]:
        await asyncio.sleep(0)
        return [0.0]


class PlayedEngine(Engine):
    """An engine with real child processes and fake tokens."""

    is_zombie = False
    """Whether its first child hangs."""

    def __init__(self, config: EngineConfig, data_dir: Path) -> None:
        super().__init__(config, data_dir)
        self.client = PlayedClient(self)


def living(script: Path) -> list[int]:
    """Return the processes that run `script`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        if bytes(script) in words:
            found.append(int(path.parent.name))
    return found


async def become_ready(engine: Engine, how: str) -> None:
    """Start the engine, or watch one whose child is dead or hangs."""
    if how == "start":
        await engine.start()
    else:
        await engine.watch()


async def expect_cancelled(engine: PlayedEngine, script: Path, how: str, number: int, *, is_late: bool) -> bool:
    """Cancel at the given suspension; return whether it was reached before the engine was ready."""
    if how != "start":
        engine._process = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
        if how == "dead":
            engine._process.kill()
    stepped = CancelledAt(become_ready(engine, how), number, is_late=is_late)

    async def run() -> None:
        await stepped

    task = asyncio.create_task(run())
    ready = asyncio.create_task(engine._ready.wait())
    await asyncio.wait({task, ready}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    # The watcher of a healthy engine waits for a future that never ends, so a late cancellation never comes.
    is_reached = stepped.has_cancelled
    assert is_reached or engine.is_ready, f"neither cancelled nor ready after {stepped.num_waits} waits"
    if is_reached:
        await asyncio.wait({task}, timeout=30)
        assert task.cancelled(), f"swallowed at wait {number} of {how!r} ({is_late=})"
    ready.cancel()
    task.cancel()
    await asyncio.wait({task, ready}, timeout=30)
    async with asyncio.timeout(10):
        await engine.stop()
        while len(asyncio.all_tasks()) > 1 or living(script):
            await asyncio.sleep(0.01)
    return is_reached


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    monkeypatch.setattr("runtime.engine.process.CHILD", path)
    return path


@pytest.mark.parametrize("new_loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("how", ["start", "dead", "zombie"])
def test_a_cancellation_is_swallowed_nowhere_and_leaves_no_child_and_no_task(
    how: str, is_late: bool, new_loop: Callable[[], Any], script: Path, base_dir: Path, tmp_path: Path
):
    settings = EngineConfig(model=str(base_dir), probe_interval_seconds=0.02, probe_timeout_seconds=0.03)
    for number in itertools.count(1):
        engine = PlayedEngine(settings, tmp_path / "data")
        engine.model_path = base_dir
        engine.is_zombie = how == "zombie"
        with asyncio.Runner(loop_factory=new_loop) as runner:
            if not runner.run(expect_cancelled(engine, script, how, number, is_late=is_late)):
                break
    assert number > 5
