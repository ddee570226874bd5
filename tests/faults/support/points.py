"""Named points of the code at which a process can be made to die, without hooks in that code.

A point is a line of a function, named by a part of its source. Hazard: a changed line loses its point; a test fails
then.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from memory import adapters
from memory.adapters import write_adapter_atomically, write_manifest
from memory.records import policies, trajectories
from memory.records.policies import Policies
from memory.records.trajectories import Trajectories
from memory.storage import database
from memory.storage.database import Database
from memory.storage.sqlite import Sqlite
from optimizer.cycle import stages
from runtime.serving.hotswap import HotSwap


@dataclass(frozen=True)
class Point:
    """The moment before a line is run."""

    operation: str
    function: Callable[..., Any]
    words: str
    """Source text that is on this line and on no other of the function."""

    @property
    def name(self) -> str:
        return f"{self.operation}: {self.function.__qualname__}: {self.words}"

    @property
    def line(self) -> int:
        """Return the line's number in the file. Raises ValueError unless there is exactly one."""
        lines, first = inspect.getsourcelines(self.function)
        found = [first + number for number, line in enumerate(lines) if self.words in line]
        if len(found) != 1:
            raise ValueError(f"{self.name!r} stands on {len(found)} lines of its function: name the point anew")
        return found[0]


POINTS = [
    Point(operation, function, words)
    for operation, function, words in (
        ("log", Trajectories.open, "await self._database.insert_row("),
        ("log", Database.insert_row, "return await self._enqueue("),
        ("log", Trajectories.append, "self._database.insert_row("),
        ("log", Database._put, "self._waiting.append(write)"),
        ("log", Database._next_batch, "batch, self._waiting ="),
        ("log", Database._commit, "with connection.begin():"),
        ("log", Database._commit, "for same in _group(batch):"),
        ("log", Database._run, "results = [work(connection)]"),
        ("log", Sqlite.insert_rows, "cursor.execute(sql, row)"),
        ("log", database._in_session, "session.commit()"),
        ("log", Database._write_forever, "self._count(batch)"),
        ("log", Database._write_forever, "_resolve(batch)"),
        ("log", database._settle_all, "write.settle()"),
        ("log", trajectories._close, "trajectory.stage = stage"),
        ("log", Trajectories.close, "self.note_exemplar(session, trajectory)"),
        ("log", Trajectories.add_reward, "session.flush()"),
        ("train", stages._reserve_version, "shutil.rmtree("),
        ("train", stages._reserve_version, "await context.save_artifacts("),
        ("train", write_manifest, "files = {"),
        ("train", write_manifest, ".write_text("),
        ("train", write_adapter_atomically, "for path in"),
        ("train", adapters._sync, "os.fsync(descriptor)"),
        ("train", write_adapter_atomically, "temporary.rename(final)"),
        ("train", write_adapter_atomically, "_sync(final.parent)"),
        ("train", stages._register, "policy = next("),
        ("train", Policies.draft, "session.add(policy)"),
        ("train", stages._register, "if policy.version != spec.version"),
        ("train", stages._train_and_register, "await context.save_artifacts("),
        ("train", stages.nominate, "await context.memory.policies.move("),
        ("train", stages.nominate, "await context.save_artifacts("),
        ("promote", Policies.promote, "return await self._write_and_notify(write)"),
        ("promote", Policies.promote, "_replace_active(session, policy)"),
        ("promote", policies._replace_active, "here = _newest_activation(session)"),
        ("promote", policies._retire, "session.flush()"),
        ("promote", policies._activate, "session.add(Activation("),
        ("promote", Policies._write_and_notify, "for loop, event in"),
        ("rollback", Policies.rollback, "return await self._write_and_notify(write)"),
        ("rollback", Policies.rollback, "_retire(session,"),
        ("rollback", Policies.rollback, "_activate(session, policy"),
        ("rollback", Policies.rollback, "return policy"),
        ("swap", HotSwap.activate, "await self._load(loaded)"),
        ("swap", HotSwap._load, "await asyncio.to_thread(self._verify"),
        ("swap", HotSwap._load, "await self._engine.client.load_adapter("),
        ("swap", HotSwap.activate, "await self._probe("),
        ("swap", HotSwap._compare_logprobs, "served = await"),
        ("swap", HotSwap._activate, "self._retired, self._active ="),
        ("swap", HotSwap._activate, "self._refusal = None"),
        ("swap", HotSwap.activate, "await self._unload("),
        ("swap", HotSwap._unload, "loaded.is_loaded = False"),
        ("swap", HotSwap._unload, "await self._engine.client.unload_adapter("),
    )
]


def die_at(point: Point, passes: int) -> Callable[[], None]:
    """Have this process end by SIGKILL as the point is about to be passed for the `passes`-th time, in any thread.

    Threads that already run are not traced. Counting begins when the returned function is called.
    """
    code, line = inspect.unwrap(point.function).__code__, point.line
    left, is_counting = passes, False

    def watch_lines(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if is_counting and event == "line" and frame.f_lineno == line:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return watch_lines

    def watch_calls(frame: FrameType, event: str, _: Any) -> Any:
        # A nested function, such as the body of a transaction, has its own code object within these lines.
        is_inside = frame.f_code.co_filename == code.co_filename and frame.f_code.co_firstlineno <= line
        return watch_lines if is_inside else None

    def begin() -> None:
        nonlocal is_counting
        is_counting = True

    threading.settrace(watch_calls)
    sys.settrace(watch_calls)
    return begin
