"""The functions through which the optimizer reaches the world, typed; whoever composes the system hands them in.

Refuses to know what stands behind them: an engine, a graph, a test's script. The optimizer plays, prepares and asks
through these and through nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from memory.adapters import Manifest
from memory.schema import Split, Task, Trajectory
from optimizer.placement import Machine
from optimizer.training.launch import OnStep, train
from optimizer.training.spec import TrainingSpec


class Rollout(Protocol):
    async def __call__(self, task: Task, *, policy: int, use_memory: bool, temperature: float, seed: int) -> Trajectory:
        """Play one episode to its end and return its closed trajectory. An episode that goes wrong is data: its stage
        is FAILED; only a broken world raises."""
        ...


class Complete(Protocol):
    async def __call__(self, messages: list[dict[str, Any]], *, schema: dict[str, Any], max_tokens: int) -> str:
        """Answer `messages` with a model that can write prose, in JSON of `schema` where the engine can hold it to
        that. The answer may be free text all the same.

        Raises:
            CompletionError: there is no answer; as PromptTooLong, because the messages are too long.
        """
        ...


class ContextTokens(Protocol):
    async def __call__(self) -> int | None:
        """Return how many tokens the model behind `complete` can hold, prompt and answer together; None: unknown.

        Raises:
            CompletionError: the engine does not answer.
        """
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


async def unknown_context() -> int | None:
    """The `ContextTokens` of engines that do not say."""
    return None


class InspectMachine(Protocol):
    async def __call__(self) -> Machine:
        """Return the GPUs, what is free on them now, and what the engine serves."""
        ...


class OpenWindow(Protocol):
    def __call__(self, reason: str) -> AbstractAsyncContextManager[None]:
        """Stop the engine for as long as the context is open; when it closes without an error, the engine is back."""
        ...


async def find_no_gpu() -> Machine:
    """The `InspectMachine` of a machine whose CPU does everything."""
    return Machine()


@asynccontextmanager
async def leave_engine_running(reason: str) -> AsyncIterator[None]:
    """The `OpenWindow` of a composition without an engine of its own."""
    yield


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
    context_tokens: ContextTokens = unknown_context
    train: Train = train
    inspect_machine: InspectMachine = find_no_gpu
    open_window: OpenWindow = leave_engine_running
    """Used where `optimizer.gpu` is "window"."""


OnProgress = Callable[[int, int, str], Awaitable[None]]
"""`await on_progress(done, total, message)`."""
