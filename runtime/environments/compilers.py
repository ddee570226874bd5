"""A bounded pool of child processes that compile games, off the event loop and killable at any moment.

Each caller's games are compiled by up to `num_children` children, and all callers together have no more than that: a
child that has compiled `GAMES_PER_TURN` games gives its place up while others wait for one. A caller that is cancelled
kills its children; the server's end, however it comes, is theirs (`game_compiler.py`).
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

from runtime.errors import GameNotCompiled

COMMAND = (sys.executable, "-m", "runtime.environments.game_compiler")
ROOT = Path(__file__).parents[2]
NUM_CHILDREN = os.cpu_count() or 1
GAMES_PER_TURN = 8
GAME_SECONDS = 300.0
"""The longest that one game may take, the start of its child included."""
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
        self._places: asyncio.Semaphore | None = None
        self._num_waiting = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def compile(self, jobs: Sequence[Job], on_compiled: Callable[[], None]) -> None:
        """Compile all games; `on_compiled` is called after each.

        Raises:
            GameNotCompiled: a compiler died or took too long.
        """
        left = deque(jobs)
        failed: GameNotCompiled | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._num_children, len(jobs))):
                    group.create_task(self._work(left, on_compiled))
        except* GameNotCompiled as several:
            failed = next(iter(several.exceptions))
        if failed is not None:
            raise failed

    async def _work(self, left: deque[Job], on_compiled: Callable[[], None]) -> None:
        while left:
            async with self._place(), _open_child(self._command) as child:
                num_compiled = 0
                while left and (num_compiled < GAMES_PER_TURN or not self._num_waiting):
                    seed, game_file = left.popleft()
                    if not game_file.exists():  # another caller may have wanted it, too
                        await self._compile_one(child, seed, game_file)
                    num_compiled += 1
                    on_compiled()

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Hold one of the places. Those who wait are served in the order in which they came."""
        loop = asyncio.get_running_loop()
        if self._places is None or self._loop is not loop:  # commands and tests run one loop after another
            self._places, self._loop = asyncio.Semaphore(self._num_children), loop
        places = self._places
        self._num_waiting += 1
        try:
            await places.acquire()
        finally:
            self._num_waiting -= 1
        try:
            yield
        finally:
            places.release()

    async def _compile_one(self, child: _Child, seed: int, game_file: Path) -> None:
        try:
            async with asyncio.timeout(self._game_seconds):
                is_compiled = await child.compile(seed, game_file)
        except TimeoutError:
            raise GameNotCompiled(f"game {seed!r} was not compiled within {self._game_seconds:g} seconds") from None
        if not is_compiled:
            raise GameNotCompiled(f"the compiler of game {seed!r} died: {child.last_words()}")


class _Child:
    """One compiler under way."""

    def __init__(self, process: asyncio.subprocess.Process, errors: tempfile._TemporaryFileWrapper[bytes]) -> None:
        self._process = process
        self._errors = errors
        self._directories: set[Path] = set()

    async def compile(self, seed: int, game_file: Path) -> bool:
        """Return whether the game was compiled; False: the process ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._directories.add(game_file.parent)
        order = json.dumps({"seed": seed, "game_file": str(game_file.absolute())})
        try:
            self._process.stdin.write(f"{order}\n".encode())
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return False
        return bool(await self._process.stdout.readline())

    def last_words(self) -> str:
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - ERROR_CHARS))
        return self._errors.read().decode("utf-8", "replace").strip() or "it said nothing"

    async def kill(self) -> None:
        """Kill the child and what it started, and remove what it left half-made."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # Shielded: who cancels twice must not leave a process that nobody has waited for.
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
            start_new_session=True,
        )
        child = _Child(process, errors)
        try:
            yield child
        finally:
            await child.kill()
