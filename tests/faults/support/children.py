"""Processes to be killed, a thousand of them in minutes: each is forked from one that has already imported the code.

Flow: `Child(work, *arguments)` -> `work(tell, *arguments)` runs there; its messages are read here -> `kill`.
Invariant: a message that was sent before the kill is read after it, and no partial message is read.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Tell = Callable[..., None]
"""`tell("closed", trajectory_id)`: sent to the parent when it returns, even if this process is killed then."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "chromadb", "tests.faults.support.worlds", "tests.faults.support.turns", "tests.faults.support.records"]
)
PATIENCE_SECONDS = 120.0


class Child:
    """A running child process. `told` holds the messages read from it so far, as tuples."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self.told: list[tuple] = []
        self._connection, theirs = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(target=_run, args=(work, theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.started_at = time.monotonic()

    def listen(self, *, seconds: float = PATIENCE_SECONDS, until: Callable[[], bool] = lambda: False) -> bool:
        """Read messages until the time is up or `until` holds; return False once the process has ended."""
        deadline = time.monotonic() + seconds
        while not until() and (left := deadline - time.monotonic()) > 0:
            if self._connection.poll(left) and not self._read():
                return False
        return True

    def kill(self) -> None:
        """End the process by SIGKILL at any point, and read its last messages."""
        self._process.kill()
        self.join()

    def join(self) -> int:
        """Read until the process ends; return its exit code, negative for a signal."""
        if self.listen():
            self._process.kill()
            raise AssertionError(f"a child did not end within {PATIENCE_SECONDS:g} seconds; it told {self.told[-5:]}")
        self._process.join()
        self._connection.close()
        return self._process.exitcode

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> bool:
        try:
            self.told.append(self._connection.recv())
        except (EOFError, OSError):
            return False
        return True


def _run(work: Callable[..., None], connection: Connection, arguments: tuple) -> None:
    work(lambda *words: connection.send(words), *arguments)
