"""The seam to worlds that can be played again.

Refuses to know who plays, with which policy, or what becomes of the reward. An `Environment` names tasks and starts
them; a `Playthrough` is one of them under way: tools act on it, and closing it yields the outcome.

Invariant: the same task starts in the same state every time, in any process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memory.schema import Split, Task
from runtime.tools.base import Tool


@dataclass(frozen=True)
class Outcome:
    """What one playthrough was worth: `value` in [0, 1], and why."""

    value: float
    reason: str


class Playthrough(ABC):
    """One task under way. Its tools change it; once `is_done` no tool may act on it again."""

    task: Task
    task_text: str
    """The first user message."""
    tools: Sequence[Tool]
    is_done: bool = False
    closing_text: str = ""
    """The environment's last words, once done."""

    @abstractmethod
    async def close(self) -> Outcome:
        """Free what the playthrough holds and judge it. Called exactly once, done or not."""


class Environment(ABC):
    """A family of tasks in disjoint splits, each task found again by its name."""

    name: str
    system_prompt: str
    temperature: float | None = None
    """How replies are sampled where the request does not say, for users and for the release gate alike; None: as the
    agent is configured."""
    max_output_tokens: int = 512
    """Most tokens of one model call where the request does not say: a move is short, and a model that rambles would
    slow practice and evaluation down."""

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
        """Return up to `num_tasks` held-out tasks that `tasks` never returns; only a release's report plays them."""
        return []

    async def prepare(self, tasks: Sequence[Task], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Do ahead of time whatever starting these tasks would have to wait for. `on_progress(done, total)`."""
        return

    @abstractmethod
    async def start(self, task: Task) -> Playthrough:
        """Start `task` from its beginning."""
