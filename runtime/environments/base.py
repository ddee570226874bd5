"""The interface of environments, whose tasks can be played again.

An `Environment` names tasks and starts them; a `Playthrough` is a started task: tools act on it, and closing it returns
its `Outcome`. A task without tools to run reads the replies themselves (`Playthrough.read_reply`). Nothing in it
depends on a policy or on the use of rewards: evaluation and users share one code path.
Invariant: the same task starts in the same state every time, in any process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from memory.schema import Split, Task
from runtime.engine.client import Message, ToolCall
from runtime.errors import TaskSealed, UnknownEnvironment
from runtime.tools.base import Tool

MAX_FAILURE_CHARS = 500
LISTED_SEALED = 1000
"""Sealed tasks among which one is looked for by default: a class may make as many as it is asked for."""


@dataclass(frozen=True)
class Outcome:
    """The reward of one playthrough: `value` in [0, 1], with a reason in words."""

    value: float
    reason: str


class Playthrough(ABC):
    """One started task. Its tools change its state; once `is_done`, no tool may act on it again."""

    task: Task
    task_text: str
    """The first user message."""
    tools: Sequence[Tool]
    is_done: bool = False
    closing_text: str = ""
    """The environment's last observation, once done."""

    @property
    def opening(self) -> Sequence[Message]:
        """The messages before the first reply; a system message among them replaces the environment's prompt."""
        return [{"role": "user", "content": self.task_text}]

    def read_reply(self, text: str, calls: Sequence[ToolCall]) -> None:
        """Read one reply of the model, before its calls run; if it ends the task, set `is_done`, and none of them runs.

        Must not block.
        """
        return

    @abstractmethod
    async def close(self) -> Outcome:
        """Release the playthrough's resources and score it. Called exactly once, done or not."""


class Environment(ABC):
    """A family of tasks in disjoint splits; a task's name identifies it."""

    name: str
    system_prompt: str
    temperature: float | None = None
    """Sampling temperature unless the request sets one, for users and the release gate alike; None uses the agent's."""
    max_output_tokens: int = 512
    """Maximum tokens of one model call unless the request sets one. A move is short; long replies would slow practice
    and evaluation down."""
    can_replay: bool = True
    """Whether the same calls get the same answers after every start. False where chance or the outside world has a part
    in them: then no episode can branch."""

    @abstractmethod
    def task(self, name: str) -> Task:
        """Return the task called `name`.

        Raises:
            UnknownTask: no task of this environment has that name.
        """

    @abstractmethod
    def tasks(self, split: Split, num_tasks: int, *, offset: int = 0) -> list[Task]:
        """Return `num_tasks` tasks of a split, always the same ones for the same arguments."""

    def sealed_tasks(self, num_tasks: int) -> list[Task]:
        """Return up to `num_tasks` held-out tasks that `tasks` never returns; only a cycle's report plays them."""
        return []

    def is_sealed(self, name: str) -> bool:
        """Whether a task is among the sealed ones; a class with more than `LISTED_SEALED` overrides this."""
        return name in self._sealed_names

    @cached_property
    def _sealed_names(self) -> frozenset[str]:
        return frozenset(task.name for task in self.sealed_tasks(LISTED_SEALED))

    def open_task(self, name: str) -> Task:
        """Return the task called `name`, for somebody who asks to play it.

        Raises:
            UnknownTask: as `task` does.
            TaskSealed: what has been played may have been learned from, and would prove nothing any more.
        """
        task = self.task(name)
        if task.split is Split.HELD_OUT and self.is_sealed(task.name):
            raise TaskSealed(f"task {name!r} of {self.name} is sealed: only the report of a release plays it")
        return task

    def holds_out(self, name: str | None, texts: Sequence[str]) -> bool:
        """Whether one of the tasks that `find_tasks` returns is held out or sealed."""
        return any(map(self._is_held_out, self.find_tasks(name, texts)))

    def _is_held_out(self, name: str) -> bool:
        try:
            return self.task(name).split is Split.HELD_OUT
        except ValueError:  # UnknownTask, or what a class makes of a name of another form
            return False

    def find_tasks(self, name: str | None, texts: Sequence[str]) -> Collection[str]:
        """Return the tasks that a row of training data may be of: the one of this name or, where none here has it and
        what tasks ask is known without starting them, those that ask one of `texts`."""
        return [name] if name is not None else []

    async def prepare(self, tasks: Sequence[Task], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Do slow work of starting these tasks ahead of time; call `on_progress(num_done, num_total)` after each."""
        return

    async def demonstrate(self, task: Task) -> list[Message] | None:
        """Return messages that solve a practice task, from its opening on; None where none is known, and for held-out
        tasks."""
        return None

    @abstractmethod
    async def start(self, task: Task) -> Playthrough:
        """Start `task` from its beginning."""


def describe_failure(task: Task, error: Exception) -> str:
    """Return, in one line, which task could not be played and why."""
    return f"{task.name!r}: {' '.join(f'{type(error).__name__}: {error}'.split())[:MAX_FAILURE_CHARS]}"


def find_environment(environments: Mapping[str, Environment], name: str) -> Environment:
    """Return the environment called `name`.

    Raises:
        UnknownEnvironment: no environment has that name; the message lists the existing ones.
    """
    if name not in environments:
        known = ", ".join(sorted(environments)) or "none"
        raise UnknownEnvironment(f"no environment is called {name!r}; there is: {known}")
    return environments[name]
