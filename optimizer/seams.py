"""The functions through which the optimizer reaches the world, typed; the composition root passes them in.

Invariant: the optimizer plays episodes, prepares tasks and calls models through these seams only, so that an engine and
a test's script are the same to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from memory.adapters import Manifest
from memory.schema import Split, Task, Trajectory
from optimizer.placement import Hardware
from optimizer.training.launch import OnStep, train
from optimizer.training.spec import TrainingSpec


class Rollout(Protocol):
    # seed: of the first model call, each further call takes the next one; the seeds of two tries must lie further apart
    # than an episode has calls (SEED_STRIDE in evaluation/cells.py)
    async def __call__(
        self,
        task: Task,
        *,
        policy: int,
        use_memory: bool,
        temperature: float,
        seed: int,
        keeps_logprobs: bool = False,
    ) -> Trajectory:
        """Play one episode to its end and return its closed trajectory, with the log-probs of the policy's tokens if
        `keeps_logprobs`. An episode that goes wrong is data: its stage is FAILED; only a broken world raises."""
        ...


class Branch(Protocol):
    async def __call__(self, origin: Trajectory, *, position: int, temperature: float, seed: int) -> Trajectory:
        """Start the task of `origin` again, replay its steps before `position`, and have the same policy play on from
        there to the end; return the closed trajectory. It belongs to whom `origin` does.

        Raises:
            ReplayMismatch: the environment did not answer as in `origin`; nothing was recorded.
        """
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
    # a stage that is repeated after a crash lists its tasks again: a listing that drifts would mix two blocks
    def __call__(self, environment: str, split: Split, num_tasks: int, offset: int = 0) -> list[Task]:
        """Return tasks; the same arguments always give the same tasks."""
        ...


class Prepare(Protocol):
    async def __call__(self, tasks: Sequence[Task], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Do the work ahead of time that starting `tasks` would wait for."""
        ...


class Train(Protocol):
    async def __call__(self, spec: TrainingSpec, *, on_step: OnStep | None = None, num_attempts: int = 2) -> Manifest:
        """Return the manifest of the adapter that `spec` describes, training it unless that was done before."""
        ...


async def unknown_context() -> int | None:
    """The `ContextTokens` of engines that do not report their context."""
    return None


class InspectHardware(Protocol):
    async def __call__(self) -> Hardware:
        """Return the GPUs, their free memory, and the context and adapters that the engine serves."""
        ...


class OpenWindow(Protocol):
    def __call__(self, reason: str) -> AbstractAsyncContextManager[None]:
        """Stop the engine for as long as the context is open; when it closes without an error, the engine is back."""
        ...


async def find_no_gpu() -> Hardware:
    """The `InspectHardware` of a computer without a GPU."""
    return Hardware()


@asynccontextmanager
async def leave_engine_running(reason: str) -> AsyncIterator[None]:
    """The `OpenWindow` of a composition without an engine of its own."""
    yield


@dataclass(frozen=True)
class Serving:
    """The defaults with which users are served."""

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


class HoldsOut(Protocol):
    def __call__(self, environment: str, task: str | None, texts: Sequence[str]) -> bool:
        """Return whether a task of the environment is held out or sealed: by its name or, where the environment has no
        task of that name, by what its users say."""
        ...


def holds_out_nothing(environment: str, task: str | None, texts: Sequence[str]) -> bool:
    """The `HoldsOut` of compositions whose tasks are all for practice."""
    return False


class FindTasks(Protocol):
    def __call__(self, environment: str, task: str | None, texts: Sequence[str]) -> Collection[str]:
        """Return the tasks of the environment that a row may be of: the one of its name or, where the environment has
        none of that name, those that ask what its users say, as far as that is known."""
        ...


def find_named_task(environment: str, task: str | None, texts: Sequence[str]) -> Collection[str]:
    """The `FindTasks` of environments that do not know what their tasks ask."""
    return [task] if task is not None else []


def branch_nowhere(environment: str) -> Branch | None:
    """The `Seams.branching` of compositions without environments that can be replayed."""
    return None


def serve_greedily(environment: str) -> Serving:
    """The `Seams.serving` of environments whose replies are not sampled."""
    return Serving()


async def prepare_nothing(tasks: Sequence[Task], on_progress: Callable[[int, int], None] | None = None) -> None:
    """The `Prepare` of environments that start at once."""


@dataclass(frozen=True)
class Seams:
    """The functions that the optimizer acts through; all but the first two have a default."""

    rollout: Rollout
    tasks: ListTasks
    prepare: Prepare = prepare_nothing
    sealed_tasks: ListSealedTasks = no_sealed_tasks
    holds_out: HoldsOut = holds_out_nothing
    find_tasks: FindTasks = find_named_task
    serving: Callable[[str], Serving] = serve_greedily
    """Environment -> the defaults of its users; `""` is live traffic."""
    branching: Callable[[str], Branch | None] = branch_nowhere
    """Environment -> the function that plays branches in it; None where its episodes cannot be replayed."""
    complete: Complete | None = None
    """None: no model here writes prose, so insights come from counting."""
    context_tokens: ContextTokens = unknown_context
    train: Train = train
    inspect_hardware: InspectHardware = find_no_gpu
    open_window: OpenWindow = leave_engine_running
    """Used only where `optimizer.gpu` is "window"."""


OnProgress = Callable[[int, int, str], Awaitable[None]]
"""`await on_progress(done, total, message)`."""
Played = TypeVar("Played")


async def play_all(
    episodes: Sequence[Callable[[], Awaitable[Played]]],
    *,
    concurrency: int,
    label: str,
    on_progress: OnProgress | None = None,
) -> list[Played]:
    """Await every episode, at most `concurrency` at a time; `label` is the message of the progress."""
    semaphore = asyncio.Semaphore(concurrency)
    num_done = 0

    async def play_one(episode: Callable[[], Awaitable[Played]]) -> Played:
        nonlocal num_done
        async with semaphore:
            played = await episode()
        num_done += 1
        if on_progress is not None:
            await on_progress(num_done, len(episodes), label)
        return played

    # one rollout that raises cancels all others: an episode that goes wrong must come back as FAILED instead (Rollout)
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(play_one(episode)) for episode in episodes]
    return [each.result() for each in running]
