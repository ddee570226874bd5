"""A bounded pool of child processes that compile games.

Invariants: all callers together use at most `num_children` children; a child gives up its slot after `GAMES_PER_SLOT`
games while other callers wait. Cancelling a caller kills its children, and no child outlives the server
(`game_compiler.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import IO

from runtime.errors import GameNotCompiled

COMMAND = (sys.executable, "-m", "runtime.environments.game_compiler")
ROOT = Path(__file__).parents[2]
NUM_CHILDREN = os.cpu_count() or 1
GAMES_PER_SLOT = 8
GAME_SECONDS = 300.0
"""Maximum duration for one game, including the start of its child."""
ERROR_CHARS = 2_000

Job = tuple[int, Path]


class CompilerPool:
    """Compiles games by seed; at most `num_children` processes at once."""

    def __init__(
        self,
        command: Sequence[str] = COMMAND,
        *,
        num_children: int = NUM_CHILDREN,
        game_seconds: float = GAME_SECONDS,
    ) -> None:
        self._command = command
        self._num_children = num_children
        self._game_seconds = game_seconds
        self._slots: asyncio.Semaphore | None = None
        self._num_waiting = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def compile(self, jobs: Sequence[Job], on_compiled: Callable[[], None]) -> None:
        """Compile all games; `on_compiled` is called after each.

        Raises:
            GameNotCompiled: a compiler died or took too long.
        """
        pending = deque(jobs)
        failed: GameNotCompiled | None = None
        try:
            # The first failure cancels the other workers, whose children are killed with them.
            async with asyncio.TaskGroup() as group:
                # All workers take from one queue, and `popleft` has no `await` before it: no game is compiled twice by
                # one caller.
                for _ in range(min(self._num_children, len(jobs))):
                    group.create_task(self._work(pending, on_compiled))
        except* GameNotCompiled as errors:
            failed = _first_leaf(errors)
        if failed is not None:
            raise failed

    async def _work(self, pending: deque[Job], on_compiled: Callable[[], None]) -> None:
        while pending:
            async with self._occupy_slot(), _open_child(self._command) as child:
                num_compiled = 0
                while pending and (num_compiled < GAMES_PER_SLOT or not self._num_waiting):
                    seed, game_file = pending.popleft()
                    if not game_file.exists():  # another caller may have compiled it meanwhile
                        await self._compile_one(child, seed, game_file)
                    num_compiled += 1
                    on_compiled()

    @contextlib.asynccontextmanager
    async def _occupy_slot(self) -> AsyncIterator[None]:
        """Occupy a slot, first come, first served."""
        loop = asyncio.get_running_loop()
        # A semaphore belongs to one event loop; commands and tests run several after another.
        if self._slots is None or self._loop is not loop:
            self._slots, self._loop = asyncio.Semaphore(self._num_children), loop
        slots = self._slots
        self._num_waiting += 1
        try:
            await slots.acquire()
        finally:
            self._num_waiting -= 1
        try:
            yield
        finally:
            slots.release()

    async def _compile_one(self, child: _Child, seed: int, game_file: Path) -> None:
        try:
            async with asyncio.timeout(self._game_seconds):
                is_compiled = await child.compile(seed, game_file)
        except TimeoutError:
            raise GameNotCompiled(f"game {seed!r} was not compiled within {self._game_seconds:g} seconds") from None
        if not is_compiled:
            raise GameNotCompiled(f"the compiler of game {seed!r} died: {child.error_tail()}")


def _first_leaf(errors: BaseExceptionGroup[GameNotCompiled]) -> GameNotCompiled:
    first = errors.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first


class _Child:
    """One compiler process."""

    def __init__(self, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors
        self._directories: set[Path] = set()

    async def compile(self, seed: int, game_file: Path) -> bool:
        """Compile a game; return False if the process ended instead."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._directories.add(game_file.parent)
        job = json.dumps({"seed": seed, "game_file": str(game_file.absolute())})
        try:
            self._process.stdin.write(f"{job}\n".encode())
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return False
        # An empty line is the end of the process's output: each confirmation has its line feed.
        return bool(await self._process.stdout.readline())

    def error_tail(self) -> str:
        """Return the end of the process's standard error."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - ERROR_CHARS))
        return self._errors.read().decode("utf-8", "replace").strip() or "it printed no error"

    async def kill(self) -> None:
        """Kill the child with its own children, and delete its partial files."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # Shielded: a second cancellation must not leave a zombie process.
        await asyncio.shield(asyncio.ensure_future(self._process.wait()))
        for directory in self._directories:
            for partial in directory.glob(f"partial-{self._process.pid}-*"):
                partial.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _open_child(command: Sequence[str]) -> AsyncIterator[_Child]:
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # a process group of its own, which `kill` and the child itself end
        )
        child = _Child(process, errors)
        try:
            yield child
        finally:
            await child.kill()
