"""The functions through which the optimizer reaches the world, typed; whoever composes the system hands them in.

Refuses to know what stands behind them: an engine, a graph, a test's script. The optimizer plays, prepares and asks
through these and through nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from memory.adapters import Manifest
from memory.schema import Split, Task, Trajectory
from optimizer.training.launch import OnStep, train
from optimizer.training.spec import TrainingSpec


class Rollout(Protocol):
    async def __call__(self, task: Task, *, policy: int, use_memory: bool, temperature: float, seed: int) -> Trajectory:
        """Play one episode to its end and return its closed trajectory. An episode that goes wrong is data: its stage
        is FAILED; only a broken world raises."""
        ...


class Complete(Protocol):
    async def __call__(self, messages: list[dict[str, Any]]) -> str:
        """Answer `messages` with a model that can write prose."""
        ...


class ListTasks(Protocol):
    def __call__(self, environment: str, split: Split, num_tasks: int, offset: int = 0) -> list[Task]:
        """Return the same tasks for the same arguments, always."""
        ...


class Prepare(Protocol):
    async def __call__(self, tasks: Sequence[Task], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Do ahead of time what starting `tasks` would wait for."""
        ...


class Train(Protocol):
    async def __call__(self, spec: TrainingSpec, *, on_step: OnStep | None = None, num_attempts: int = 2) -> Manifest:
        """Make the adapter directory that `spec` asks for, or find it made."""
        ...


@dataclass(frozen=True)
class Serving:
    """How users are served where their request does not say."""

    temperature: float = 0.0
    use_memory: bool = True


class ListSealedTasks(Protocol):
    def __call__(self, environment: str, num_tasks: int) -> list[Task]:
        """Return tasks of the sealed block: held-out tasks that no other listing returns; fewer, or none, where the
        environment has no more."""
        ...


def no_sealed_tasks(environment: str, num_tasks: int) -> list[Task]:
    """The `ListSealedTasks` of environments that keep nothing sealed."""
    return []


def serve_greedily(environment: str) -> Serving:
    """The `Seams.serving` of environments whose replies are not sampled."""
    return Serving()


async def prepare_nothing(tasks: Sequence[Task], on_progress: Callable[[int, int], None] | None = None) -> None:
    """The `Prepare` of environments that start at once."""


@dataclass(frozen=True)
class Seams:
    """What the optimizer is given to act with."""

    rollout: Rollout
    tasks: ListTasks
    prepare: Prepare = prepare_nothing
    sealed_tasks: ListSealedTasks = no_sealed_tasks
    serving: Callable[[str], Serving] = serve_greedily
    """Environment -> how its users are served; `""` is live traffic."""
    complete: Complete | None = None
    """None: no model here writes prose, so insights come from counting."""
    train: Train = train


OnProgress = Callable[[int, int, str], Awaitable[None]]
"""`await on_progress(done, total, message)`."""
