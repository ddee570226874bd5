"""Replays the beginning of a recorded episode in a task that was started again.

The environment has to answer as it did then, character by character: only then does a branch go on from the same state.
Flow: opening and tools compared -> each reply read, each call run, each result compared.
"""

from __future__ import annotations

from memory.errors import ReplayMismatch
from memory.schema import Step, StepKind, clean
from runtime.agent.nodes import run_call
from runtime.agent.state import Episode
from runtime.agent.turn import BranchOrigin
from runtime.engine.client import ToolCall

SHOWN_CHARS = 200


async def replay(episode: Episode, origin: BranchOrigin) -> None:
    """Bring the episode's playthrough to where `origin` is left, and charge its budget for the replayed model calls.

    Raises:
        ReplayMismatch: the task opens differently, answers differently, or ends before.
    """
    _compare_opening(episode, origin)
    playthrough, calls = episode.playthrough, list[ToolCall]()
    assert playthrough is not None
    for step in origin.steps:
        if step.kind is StepKind.MODEL:
            playthrough.read_reply(step.content, step.tool_calls)
            episode.budget.charge(_count_tokens(step))
            calls = list(step.tool_calls)
        else:
            await _repeat_call(episode, step, calls.pop(0) if calls else None)
        if playthrough.is_done:
            raise ReplayMismatch(f"{_name(episode, step)}: the task ends here, and went on in {origin.trajectory.id!r}")


def _compare_opening(episode: Episode, origin: BranchOrigin) -> None:
    recorded = origin.trajectory
    if episode.opening != recorded.opening:
        raise ReplayMismatch(f"the task {recorded.task!r} opens with other messages than in {recorded.id!r}")
    if episode.definitions != recorded.tools:
        raise ReplayMismatch(f"the task {recorded.task!r} opens with other tools than in {recorded.id!r}")


async def _repeat_call(episode: Episode, step: Step, call: ToolCall | None) -> None:
    if call is None or call["id"] != step.tool_call_id:
        raise ReplayMismatch(f"{_name(episode, step)} is no result of the reply before it: it cannot be replayed")
    result, _ = await run_call(episode, call)
    episode.num_invalid_tool_calls += result.is_invalid
    # As it is stored: a result with NUL or lone surrogates is stored without them.
    if clean(result.content) != step.content:
        raise ReplayMismatch(
            f"{_name(episode, step)}: {call['function']['name']!r} answers {_cut(result.content)} to the same call, "
            f"and answered {_cut(step.content)}"
        )


def _count_tokens(step: Step) -> int:
    return len(step.prompt_token_ids or ()) + len(step.output_token_ids or ())


def _name(episode: Episode, step: Step) -> str:
    task = episode.request.task
    return f"step {step.position} of the task {task.name if task is not None else None!r}"


def _cut(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")
