"""A teacher plays practice tasks of an environment; the episodes that the environment rewards are kept.

Keeping only rewarded episodes is rejection sampling, as in RFT (arXiv 2308.01825) and AgentTuning (arXiv 2310.12823).
Invariants: a teacher is shown practice tasks only. An episode that failed is counted and stored nowhere, and ends
nothing but itself. A kept one is saved before the next task of its slot starts, so that an interruption loses none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from memory.schema import Split, Task
from runtime.engine.client import Message, ToolDefinition
from runtime.environments.base import Environment, Playthrough, describe_failure
from runtime.errors import EnvironmentRefused
from runtime.serving.chat_endpoint import ChatEndpoint, EndpointError, EndpointReply
from runtime.teacher.budget import BudgetSpent
from runtime.tools.base import Tool, parse_arguments, run_tool
from runtime.tools.recorded import tools_for

MAX_NAMED_FAILURES = 20


@dataclass(frozen=True, kw_only=True)
class TeachingLimits:
    """The limits of one episode, and when it counts as solved."""

    max_steps: int
    max_seconds: float
    max_output_tokens: int
    success_reward: float


@dataclass
class TaughtEpisode:
    """An episode that a teacher plays."""

    task: str
    prompt: list[Message]
    tools: list[ToolDefinition]
    completion: list[Message] = field(default_factory=list)
    reward: float = 0.0
    is_trusted: bool = True
    """Whether every tool result in it is trusted."""
    is_flawed: bool = False
    """Whether a reply is empty or cut off, or calls with arguments that are no JSON object: nothing to imitate,
    whatever the reward."""

    def to_row(self) -> dict[str, Any]:
        """Return the demonstration as a row of the format `ratchet`."""
        return {
            "kind": "demonstration",
            "prompt": self.prompt,
            "completion": self.completion,
            "tools": self.tools,
            "reward": self.reward,
            "task": self.task,
        }


@dataclass
class TeachingCounts:
    """The outcomes of the tasks of a run."""

    num_tasks: int = 0
    num_solved: int = 0
    num_unsolved: int = 0
    num_failed: int = 0
    """Tasks whose environment failed, or that ran out of time."""
    failures: list[str] = field(default_factory=list)
    """The first of these tasks, each with its error."""
    num_unplayed: int = 0
    """Tasks that were not begun, or not ended, because of `stopped_by`."""
    stopped_by: str | None = None
    """Why tasks were left unplayed."""
    error_status: int | None = None
    """The endpoint's status, where it failed with one."""
    has_teacher_failed: bool = False
    is_environment_refused: bool = False
    """Whether the environment can start no task."""

    def note_failure(self, task: Task, error: Exception) -> None:
        """Count a task that failed."""
        self.num_failed += 1
        if len(self.failures) < MAX_NAMED_FAILURES:
            self.failures.append(describe_failure(task, error))


Save = Callable[[TaughtEpisode], Awaitable[None]]
OnTaught = Callable[[TeachingCounts], None]


async def teach(
    environment: Environment,
    tasks: Sequence[Task],
    teacher: ChatEndpoint,
    limits: TeachingLimits,
    *,
    save: Save,
    concurrency: int,
    on_taught: OnTaught,
) -> TeachingCounts:
    """Play each task once, until all are played, the budget is spent, the teacher fails or the environment is refused.

    Raises:
        ValueError: one of the tasks is no practice task; then none was played.
    """
    for task in tasks:
        require_practice(task)
    counts = TeachingCounts(num_tasks=len(tasks))
    waiting = list(reversed(tasks))

    async def play_in_turn() -> None:
        while waiting and counts.stopped_by is None:
            task = waiting.pop()
            try:
                await _play_and_save(environment, task, teacher, limits, save, counts)
            except BudgetSpent as spent:
                counts.num_unplayed += 1
                counts.stopped_by = counts.stopped_by or str(spent)
            except EndpointError as error:
                counts.num_unplayed += 1
                counts.stopped_by, counts.error_status = str(error), error.status
                counts.has_teacher_failed = True
            except EnvironmentRefused as error:
                counts.num_unplayed += 1
                counts.stopped_by, counts.is_environment_refused = str(error), True
            on_taught(counts)

    slots = [asyncio.ensure_future(play_in_turn()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*slots)
    finally:
        for slot in slots:  # after the first error, or Ctrl-C, `gather` leaves the others running
            slot.cancel()
    counts.num_unplayed += len(waiting)
    return counts


def require_practice(task: Task) -> None:
    """Raise ValueError unless a teacher may be shown the task."""
    if task.split is not Split.PRACTICE:
        raise ValueError(
            f"{task.name!r} of {task.environment!r} is a {task.split.value} task: a teacher plays practice tasks only"
        )


async def _play_and_save(
    environment: Environment,
    task: Task,
    teacher: ChatEndpoint,
    limits: TeachingLimits,
    save: Save,
    counts: TeachingCounts,
) -> None:
    limit = asyncio.timeout(limits.max_seconds)
    try:
        async with limit:
            episode = await play(environment, task, teacher, limits)
    except (BudgetSpent, EndpointError, EnvironmentRefused):  # no other task would escape these
        raise
    except Exception as error:  # the episode's edge: an environment may raise anything
        late = TimeoutError(f"it did not end within {limits.max_seconds:g} seconds")
        counts.note_failure(task, late if limit.expired() else error)
        return
    if episode.reward < limits.success_reward or episode.is_flawed:
        counts.num_unsolved += 1
        return
    await save(episode)
    counts.num_solved += 1


async def play(environment: Environment, task: Task, teacher: ChatEndpoint, limits: TeachingLimits) -> TaughtEpisode:
    """Play one practice task and return the episode with the environment's reward.

    Raises:
        BudgetSpent, EndpointError: the episode could not be ended.
        Exception: the environment's own.
    """
    require_practice(task)
    playthrough = await environment.start(task)
    is_closed = False
    try:
        tools = {tool.name: tool for tool in tools_for(task.split, playthrough.tools, lambda name, arguments: None)}
        opening = list(playthrough.opening)
        if environment.system_prompt and opening[0].get("role") not in ("system", "developer"):
            opening = [{"role": "system", "content": environment.system_prompt}, *opening]
        episode = TaughtEpisode(task.name, opening, [tool.definition() for tool in tools.values()])
        for _ in range(limits.max_steps):
            if await _take_step(episode, playthrough, tools, teacher, limits):
                break
        is_closed = True  # before the `await`: a cancellation within must not lead to a second closing
        episode.reward = (await playthrough.close()).value
        return episode
    finally:
        if not is_closed:  # another error is on its way, which that of closing must not replace
            await asyncio.gather(playthrough.close(), return_exceptions=True)


async def _take_step(
    episode: TaughtEpisode,
    playthrough: Playthrough,
    tools: dict[str, Tool],
    teacher: ChatEndpoint,
    limits: TeachingLimits,
) -> bool:
    """Play one reply and its calls; return whether the episode is over."""
    reply = await teacher.complete(
        [*episode.prompt, *episode.completion], episode.tools, max_tokens=limits.max_output_tokens
    )
    message = reply.as_message()
    episode.completion.append(message)
    episode.is_flawed |= _is_flawed(reply)
    playthrough.read_reply(reply.content, reply.tool_calls)
    if playthrough.is_done or not reply.tool_calls:
        return True
    for number, call in enumerate(reply.tool_calls, start=1):
        name = call["function"]["name"]
        if name in tools:
            result = await run_tool(tools[name], call["function"]["arguments"])
            content, is_trusted = result.content, result.is_trusted
        else:
            content, is_trusted = f"Error: there is no tool {name!r}", True
        episode.is_trusted &= is_trusted
        episode.completion.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        if playthrough.is_done:
            # Calls that follow in the same reply were not run, so they are no part of what solved the task.
            message["tool_calls"] = reply.tool_calls[:number]
            return True
    return False


def _is_flawed(reply: EndpointReply) -> bool:
    is_empty = not reply.content and not reply.tool_calls
    try:
        for call in reply.tool_calls:
            parse_arguments(call["function"]["arguments"])
    except ValueError:
        return True
    return is_empty or reply.is_cut
