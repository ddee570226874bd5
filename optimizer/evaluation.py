"""Plays candidate and incumbent on the same held-out tasks and decides: promote, reject or uninformative.

Refuses to write stages, to train, and to play by any other path than the rollout that serves users.

Flow: `play_cell` per (policy, memory on or off) -> `judge` two cells, task by task -> `Verdict`.
Invariant: a promotion needs an interval above the margin; every doubt about the measurement ends as uninformative.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from memory.schema import Task, Trajectory, TrajectoryStage
from optimizer.config import EvaluationConfig
from optimizer.intervals import PairedDifference, compare_paired, wilson
from optimizer.seams import OnProgress, Rollout

GradeTrajectory = Callable[[str], float | None]
"""Trajectory id -> the reward that counts."""

MIN_TASKS_FOR_TURNS = 10  # with fewer tasks won by both, turns are not compared


@dataclass(frozen=True)
class Cell:
    """One way of playing: a policy, with or without memory."""

    name: str
    policy: int
    use_memory: bool


@dataclass(frozen=True)
class Played:
    """What one held-out episode came to."""

    task: str
    trajectory_id: str
    is_success: bool
    is_broken: bool
    """It did not end by itself (FAILED, cancelled, out of time), or nobody said what it was worth. Its outcome says
    nothing of the policy."""
    is_truncated: bool
    """A budget of steps or tokens ended it."""
    num_turns: int
    prompt_tokens: int
    output_tokens: int
    num_invalid_tool_calls: int


@dataclass(frozen=True)
class CellResult:
    """All tasks as one cell played them."""

    cell: Cell
    played: list[Played]

    @property
    def num_successes(self) -> int:
        return sum(episode.is_success for episode in self.played)

    @property
    def success(self) -> float:
        return self.num_successes / len(self.played) if self.played else 0.0

    def share(self, flag: str) -> float:
        return sum(getattr(episode, flag) for episode in self.played) / max(1, len(self.played))

    def per_turn(self, count: str) -> float:
        return sum(getattr(episode, count) for episode in self.played) / max(1, self.num_turns)

    @property
    def num_turns(self) -> int:
        return sum(episode.num_turns for episode in self.played)

    def summary(self) -> dict[str, Any]:
        """What a table shows of this cell."""
        low, high = wilson(self.num_successes, len(self.played))
        return {
            "policy": self.cell.policy,
            "use_memory": self.cell.use_memory,
            "num_tasks": len(self.played),
            "num_successes": self.num_successes,
            "success": self.success,
            "low": low,
            "high": high,
            "turns_per_episode": self.num_turns / max(1, len(self.played)),
            "prompt_tokens_per_turn": self.per_turn("prompt_tokens"),
            "output_tokens_per_turn": self.per_turn("output_tokens"),
            "tokens_per_episode": sum(e.prompt_tokens + e.output_tokens for e in self.played)
            / max(1, len(self.played)),
            "invalid_per_turn": self.per_turn("num_invalid_tool_calls"),
            "broken_share": self.share("is_broken"),
            "truncated_share": self.share("is_truncated"),
        }


class Decision(StrEnum):
    PROMOTE = "promote"
    REJECT = "reject"
    UNINFORMATIVE = "uninformative"


@dataclass(frozen=True)
class Guard:
    """Something that must not get worse while success gets better."""

    name: str
    candidate: float
    incumbent: float
    limit: float

    @property
    def is_kept(self) -> bool:
        return self.candidate <= self.limit


@dataclass(frozen=True)
class Verdict:
    """The decision, why, and the numbers it stands on."""

    decision: Decision
    reason: str
    candidate: Cell
    incumbent: Cell
    paired: PairedDifference
    guards: list[Guard] = field(default_factory=list)
    tasks_won: list[str] = field(default_factory=list)
    """Tasks that only the candidate won."""
    tasks_lost: list[str] = field(default_factory=list)
    """Tasks that only the incumbent won."""

    def to_json(self) -> dict[str, Any]:
        guards = [{**asdict(guard), "is_kept": guard.is_kept} for guard in self.guards]
        return {**asdict(self), "decision": self.decision.value, "guards": guards}


async def play_cell(
    cell: Cell,
    tasks: Sequence[Task],
    *,
    rollout: Rollout,
    grade: GradeTrajectory,
    success_reward: float,
    concurrency: int,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> CellResult:
    """Play every task once, greedily, at most `concurrency` at a time."""
    places = asyncio.Semaphore(concurrency)
    num_done = 0

    async def play(task: Task) -> Played:
        nonlocal num_done
        async with places:
            trajectory = await rollout(task, policy=cell.policy, use_memory=cell.use_memory, temperature=0.0, seed=seed)
        num_done += 1
        if on_progress is not None:
            await on_progress(num_done, len(tasks), cell.name)
        return describe(task.name, trajectory, grade(trajectory.id), success_reward)

    async with asyncio.TaskGroup() as group:
        playing = [group.create_task(play(task)) for task in tasks]
    return CellResult(cell, [each.result() for each in playing])


def describe(task: str, trajectory: Trajectory, reward: float | None, success_reward: float) -> Played:
    """Sum up one episode."""
    error = trajectory.error or ""
    is_finished = trajectory.stage is TrajectoryStage.FINISHED
    # a client that went without a word is no budget: what it left is what its reward says
    is_cut = is_finished and error.startswith("BudgetExceeded")
    # a clock says more about the machine than about the policy; steps and tokens are the policy's own
    is_out_of_time = is_cut and "second" in error
    return Played(
        task=task,
        trajectory_id=trajectory.id,
        is_success=reward is not None and reward >= success_reward,
        is_broken=not is_finished or is_out_of_time or reward is None,
        is_truncated=is_cut and not is_out_of_time,
        num_turns=_count_turns(trajectory),
        prompt_tokens=trajectory.prompt_tokens,
        output_tokens=trajectory.output_tokens,
        num_invalid_tool_calls=trajectory.num_invalid_tool_calls,
    )


def _count_turns(trajectory: Trajectory) -> int:
    """A model step is followed by its tool result, so half of the steps, rounded up, are the model's."""
    return (trajectory.num_steps + 1) // 2


def judge(candidate: CellResult, incumbent: CellResult, config: EvaluationConfig) -> Verdict:
    """Decide by the tasks that both cells really played.

    The order of the questions matters: first whether the measurement can be trusted, then whether anything got worse,
    and only then whether success got better. "Not shown to be better" is a rejection: the ratchet turns one way.
    """
    pairs = _pair(candidate, incumbent)
    paired = compare_paired([a.is_success for a, _ in pairs], [b.is_success for _, b in pairs])
    guards = _guard(candidate, incumbent, pairs, config)
    decision, reason = _doubt(candidate, incumbent, pairs, config) or _object(guards) or _weigh(paired, config.margin)
    return Verdict(
        decision=decision,
        reason=reason,
        candidate=candidate.cell,
        incumbent=incumbent.cell,
        paired=paired,
        guards=guards,
        tasks_won=[a.task for a, b in pairs if a.is_success and not b.is_success],
        tasks_lost=[a.task for a, b in pairs if b.is_success and not a.is_success],
    )


def _pair(candidate: CellResult, incumbent: CellResult) -> list[tuple[Played, Played]]:
    others = {episode.task: episode for episode in incumbent.played}
    pairs = [(episode, others[episode.task]) for episode in candidate.played if episode.task in others]
    return [(a, b) for a, b in pairs if not a.is_broken and not b.is_broken]


def _doubt(
    candidate: CellResult, incumbent: CellResult, pairs: list[tuple[Played, Played]], config: EvaluationConfig
) -> tuple[Decision, str] | None:
    """Return why the measurement says nothing, if it does not."""
    cells = (candidate, incumbent)
    for cell in cells:
        if cell.share("is_broken") > config.max_broken_share:
            return Decision.UNINFORMATIVE, (
                f"{cell.share('is_broken'):.0%} of the episodes of {cell.cell.name!r} broke off or have no reward "
                f"(more than {config.max_broken_share:.0%}): mend the cause and evaluate again"
            )
    if len(pairs) < config.min_tasks:
        return Decision.UNINFORMATIVE, f"{len(pairs)} tasks were played by both, {config.min_tasks} are needed"
    if min(cell.share("is_truncated") for cell in cells) > config.max_truncated_share:
        return Decision.UNINFORMATIVE, (
            f"more than {config.max_truncated_share:.0%} of the episodes of both were cut by a budget: raise the budget"
        )
    rates = [sum(pair[side].is_success for pair in pairs) / len(pairs) for side in (0, 1)]
    if max(rates) <= config.floor:
        return Decision.UNINFORMATIVE, "both fail nearly every task: the tasks are too hard to tell them apart"
    if min(rates) >= 1 - config.floor:
        return Decision.UNINFORMATIVE, "both succeed at nearly every task: the tasks are too easy to tell them apart"
    return None


def _guard(
    candidate: CellResult, incumbent: CellResult, pairs: list[tuple[Played, Played]], config: EvaluationConfig
) -> list[Guard]:
    """Measure what must not get worse, like with like.

    Rates are per turn, and turns are compared on the tasks that both won: a policy that survives longer takes more
    turns in all, and that is not a fault.
    """
    cells = (candidate, incumbent)
    invalid = [cell.per_turn("num_invalid_tool_calls") for cell in cells]
    guards = [Guard("invalid tool calls per turn", *invalid, invalid[1] + config.max_extra_invalid_rate)]
    for name, count in (("output tokens per turn", "output_tokens"), ("prompt tokens per turn", "prompt_tokens")):
        tokens = [cell.per_turn(count) for cell in cells]
        guards.append(Guard(name, *tokens, tokens[1] * config.max_tokens_ratio))
    both_won = [(a.num_turns, b.num_turns) for a, b in pairs if a.is_success and b.is_success]
    if len(both_won) >= MIN_TASKS_FOR_TURNS:
        turns = [sum(pair[side] for pair in both_won) / len(both_won) for side in (0, 1)]
        guards.append(Guard("turns on tasks both won", *turns, turns[1] * config.max_turns_ratio))
    return guards


def _object(guards: list[Guard]) -> tuple[Decision, str] | None:
    broken = [guard for guard in guards if not guard.is_kept]
    if not broken:
        return None
    complaints = "; ".join(f"{g.name} {g.candidate:.3g} against {g.incumbent:.3g}, limit {g.limit:.3g}" for g in broken)
    return Decision.REJECT, f"a guard metric got worse: {complaints}"


def _weigh(paired: PairedDifference, margin: float) -> tuple[Decision, str]:
    numbers = (
        f"{paired.difference:+.1%} (95 % interval {paired.low:+.1%} to {paired.high:+.1%}, p = {paired.p_value:.2g})"
    )
    if paired.low > margin:
        return Decision.PROMOTE, f"better on the same tasks: {numbers}"
    if paired.high < 0:
        return Decision.REJECT, f"worse on the same tasks: {numbers}"
    return Decision.REJECT, f"not shown to be better by more than {margin:.1%}: {numbers}"
