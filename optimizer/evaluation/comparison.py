"""Plays candidate and incumbent on the same held-out tasks and decides: promote, reject or uninformative.

Flow: `play_cell` per (policy, memory on or off) -> `judge` two cells, task by task -> `Verdict`.

The rule. The active policy has an error budget, `false_promotion_rate`: how likely it is ever replaced by a candidate
that is no better. The k-th comparison with it, its k-th look, spends `budget * 6 / (pi^2 k^2)`; all looks together
spend no more than the budget (alpha spending: Lan and DeMets, Biometrika 70, 1983; Bonferroni over an unbounded
sequence). A promotion makes another policy the incumbent, with a budget of its own, as in alpha-investing (Foster and
Stine, JRSS B 70, 2008). The test of one look is the exact randomization test over tasks, McNemar's where each task is
tried once.

Invariants: a promotion needs a p-value within its look's share of the budget and an interval above the margin; a
rejection needs evidence too; every doubt about the measurement, and all that lies between, is uninformative.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from memory.schema import Task, Trajectory, TrajectoryStage
from optimizer.config import EvaluationConfig
from optimizer.evaluation.intervals import (
    PairedDifference,
    RateComparison,
    compare_paired,
    compare_rates,
    mean_interval,
    wilson,
)
from optimizer.seams import OnProgress, Rollout

GradeTrajectory = Callable[[str], float | None]
"""Trajectory id -> the reward that counts."""
CountModelCalls = Callable[[str], int]
"""Trajectory id -> its model calls, counted from its steps."""

MIN_TASKS_FOR_TURNS = 10  # with fewer tasks won by both, their model calls are not compared
SEED_STRIDE = 1000  # between tries: every model call of an episode takes the next seed


def alpha_of(look: int, budget: float) -> float:
    """Return what the `look`-th comparison with an incumbent may spend; over all looks the sum is `budget`."""
    return budget * 6 / (math.pi**2 * look**2)


@dataclass(frozen=True)
class Cell:
    """One way of playing: a policy, with or without memory."""

    name: str
    policy: int
    use_memory: bool


@dataclass(frozen=True)
class EpisodeSummary:
    """What one held-out episode came to."""

    task: str
    trajectory_id: str
    is_success: bool
    is_broken: bool
    """It did not end by itself (FAILED, cancelled, out of time), or has no reward. It counts as lost."""
    is_truncated: bool
    """A budget of steps or tokens ended it."""
    num_turns: int
    """Model calls."""
    prompt_tokens: int
    output_tokens: int
    num_invalid_tool_calls: int


@dataclass(frozen=True)
class CellResult:
    """All tasks as one cell played them, each once or several times."""

    cell: Cell
    played: list[EpisodeSummary]

    @cached_property
    def by_task(self) -> dict[str, list[EpisodeSummary]]:
        tries: dict[str, list[EpisodeSummary]] = defaultdict(list)
        for episode in self.played:
            tries[episode.task].append(episode)
        return dict(tries)

    @property
    def num_successes(self) -> int:
        return sum(episode.is_success for episode in self.played)

    @property
    def success(self) -> float:
        """Pass@1: the share of tries that succeeded."""
        return self.num_successes / len(self.played) if self.played else 0.0

    @property
    def num_tries(self) -> int:
        """Tries of each task, the fewest of any."""
        return min(map(len, self.by_task.values()), default=0)

    def share(self, flag: str) -> float:
        return sum(getattr(episode, flag) for episode in self.played) / max(1, len(self.played))

    def per_turn(self, count: str) -> float:
        return sum(getattr(episode, count) for episode in self.played) / max(1, self.num_turns)

    @property
    def num_turns(self) -> int:
        return sum(episode.num_turns for episode in self.played)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of pass@1; tries of one task resemble each other, so it is over tasks."""
        if self.num_tries <= 1:
            return wilson(self.num_successes, len(self.played))
        _, low, high = mean_interval([share_won(tries) for tries in self.by_task.values()])
        return max(0.0, low), min(1.0, high)

    def summary(self) -> dict[str, Any]:
        """What a table shows of this cell."""
        low, high = self.interval()
        num_tries, tasks = self.num_tries, self.by_task.values()
        solved = sum(any(episode.is_success for episode in tries) for tries in tasks)
        return {
            "policy": self.cell.policy,
            "use_memory": self.cell.use_memory,
            "num_tasks": len(tasks),
            "num_tries": num_tries,
            "num_episodes": len(self.played),
            "num_successes": self.num_successes,
            "success": self.success,
            "low": low,
            "high": high,
            "pass_at_tries": solved / len(tasks) if num_tries > 1 else None,
            "turns_per_episode": self.num_turns / max(1, len(self.played)),
            "prompt_tokens_per_turn": self.per_turn("prompt_tokens"),
            "output_tokens_per_turn": self.per_turn("output_tokens"),
            "tokens_per_episode": sum(e.prompt_tokens + e.output_tokens for e in self.played)
            / max(1, len(self.played)),
            "invalid_per_turn": self.per_turn("num_invalid_tool_calls"),
            "broken_share": self.share("is_broken"),
            "truncated_share": self.share("is_truncated"),
        }


def share_won(tries: Sequence[EpisodeSummary]) -> float:
    """Return the share of tries that succeeded."""
    return sum(episode.is_success for episode in tries) / len(tries)


class Decision(StrEnum):
    PROMOTE = "promote"
    REJECT = "reject"
    UNINFORMATIVE = "uninformative"


class Basis(StrEnum):
    """What a promotion stands on."""

    BETTER = "better"
    NO_WORSE = "no worse and cheaper"


@dataclass(frozen=True)
class Guard:
    """Something that must not get worse, or not unnoticed, while success gets better."""

    name: str
    candidate: float
    incumbent: float
    low: float | None
    """95 % interval of their ratio, candidate to incumbent, or for a hard guard of their difference; None: unknown."""
    high: float | None
    limit: float
    """What the interval is compared with."""
    is_hard: bool
    """It rejects a better candidate; one that is not hard says what better costs."""

    @property
    def is_kept(self) -> bool:
        """Whether the interval reaches below the limit: a guard objects to what was shown, not to noise."""
        return self.low is None or self.low <= self.limit


@dataclass(frozen=True)
class NonInferiority:
    """How a candidate without memory compares with the incumbent as it serves."""

    cell: Cell
    difference: float
    low: float
    """Lower end of the interval at this look's share of the budget."""
    margin: float
    tokens_saved: float
    """Tokens per episode, of the incumbent less of the candidate."""
    tokens_saved_low: float | None

    @property
    def holds(self) -> bool:
        return self.low > -self.margin and (self.tokens_saved_low or 0.0) > 0


@dataclass(frozen=True)
class Verdict:
    """The decision, why, and the numbers it stands on."""

    decision: Decision
    reason: str
    candidate: Cell
    """The candidate as it would serve."""
    incumbent: Cell
    paired: PairedDifference
    look: int
    alpha: float
    """What a test at this look spends of the incumbent's error budget."""
    was_tested: bool
    """False where the measurement itself was in doubt: then nothing is spent and no task is used up."""
    basis: Basis | None = None
    is_dearer: bool = False
    """It is promoted although a limit of turns or tokens was shown to be exceeded."""
    no_worse: NonInferiority | None = None
    guards: list[Guard] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    """The tasks that were compared."""
    tasks_won: list[str] = field(default_factory=list)
    """Tasks at which the candidate did better."""
    tasks_lost: list[str] = field(default_factory=list)
    """Tasks at which the incumbent did better."""

    def to_json(self) -> dict[str, Any]:
        guards = [{**asdict(guard), "is_kept": guard.is_kept} for guard in self.guards]
        rest = {name: value for name, value in asdict(self).items() if name != "tasks"}
        return {**rest, "decision": self.decision.value, "guards": guards}


async def play_cell(
    cell: Cell,
    tasks: Sequence[Task],
    *,
    rollout: Rollout,
    grade: GradeTrajectory,
    count_model_calls: CountModelCalls,
    success_reward: float,
    concurrency: int,
    temperature: float = 0.0,
    num_tries: int = 1,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> CellResult:
    """Play every task `num_tries` times, at most `concurrency` episodes at a time."""
    places = asyncio.Semaphore(concurrency)
    num_done = 0

    async def play(task: Task, number: int) -> EpisodeSummary:
        nonlocal num_done
        async with places:
            trajectory = await rollout(
                task,
                policy=cell.policy,
                use_memory=cell.use_memory,
                temperature=temperature,
                seed=seed + SEED_STRIDE * number,
            )
        num_done += 1
        if on_progress is not None:
            await on_progress(num_done, num_tries * len(tasks), cell.name)
        reward, num_calls = grade(trajectory.id), count_model_calls(trajectory.id)
        return describe(task.name, trajectory, reward, success_reward, num_model_calls=num_calls)

    async with asyncio.TaskGroup() as group:
        playing = [group.create_task(play(task, number)) for task in tasks for number in range(num_tries)]
    return CellResult(cell, [each.result() for each in playing])


def describe(
    task: str, trajectory: Trajectory, reward: float | None, success_reward: float, *, num_model_calls: int
) -> EpisodeSummary:
    """Sum up one episode."""
    error = trajectory.error or ""
    is_finished = trajectory.stage is TrajectoryStage.FINISHED
    # a client that went without a word is no budget: what it left is what its reward says
    is_cut = is_finished and error.startswith("BudgetExceeded")
    # a clock says more about the machine than about the policy; steps and tokens are the policy's own
    is_out_of_time = is_cut and "second" in error
    is_broken = not is_finished or is_out_of_time or reward is None
    return EpisodeSummary(
        task=task,
        trajectory_id=trajectory.id,
        is_success=not is_broken and reward >= success_reward,
        is_broken=is_broken,
        is_truncated=is_cut and not is_out_of_time,
        num_turns=num_model_calls,
        prompt_tokens=trajectory.prompt_tokens,
        output_tokens=trajectory.output_tokens,
        num_invalid_tool_calls=trajectory.num_invalid_tool_calls,
    )


@dataclass(frozen=True)
class Pair:
    """One task as both played it."""

    task: str
    ours: list[EpisodeSummary]
    theirs: list[EpisodeSummary]


def pair_tasks(candidate: CellResult, incumbent: CellResult) -> list[Pair]:
    """Return the tasks that both played. A try that broke off is lost by whoever broke; a task at which both broke in
    every try says nothing and is left out."""
    pairs = [
        Pair(task, ours, incumbent.by_task[task])
        for task, ours in candidate.by_task.items()
        if task in incumbent.by_task
    ]
    return [pair for pair in pairs if not all(episode.is_broken for episode in (*pair.ours, *pair.theirs))]


def compare_pairs(pairs: Iterable[Pair], confidence: float = 0.95) -> PairedDifference:
    """Compare how much both won of the same tasks."""
    pairs = list(pairs)
    ours, theirs = [share_won(pair.ours) for pair in pairs], [share_won(pair.theirs) for pair in pairs]
    return compare_paired(ours, theirs, confidence)


def judge(
    candidate: CellResult,
    incumbent: CellResult,
    config: EvaluationConfig,
    *,
    look: int = 1,
    without_memory: CellResult | None = None,
) -> Verdict:
    """Decide by the tasks that both cells played, at the `look`-th comparison with this incumbent.

    `without_memory` is the candidate without memory, which a non-inferiority margin is about.
    The order of the questions matters: first whether the measurement can be trusted, then whether success got better
    and at what price, then whether it is no worse and cheaper, and only then whether it got worse.
    """
    pairs = pair_tasks(candidate, incumbent)
    paired, alpha = compare_pairs(pairs), alpha_of(look, config.false_promotion_rate)
    guards = _guard(pairs, config)
    doubt = _doubt(candidate, incumbent, pairs, config)
    no_worse = None
    if doubt is None:
        no_worse = _compare_without_memory(without_memory, incumbent, config, alpha)
        conclusion = _weigh(candidate.cell, pairs, paired, guards, no_worse, config, alpha)
    else:
        conclusion = Conclusion(Decision.UNINFORMATIVE, doubt, candidate.cell)
    gains = {pair.task: share_won(pair.ours) - share_won(pair.theirs) for pair in pairs}
    return Verdict(
        decision=conclusion.decision,
        reason=conclusion.reason,
        candidate=conclusion.cell,
        incumbent=incumbent.cell,
        paired=paired,
        look=look,
        alpha=alpha,
        was_tested=doubt is None,
        basis=conclusion.basis,
        is_dearer=conclusion.is_dearer,
        no_worse=no_worse,
        guards=guards,
        tasks=list(gains),
        tasks_won=[task for task, gain in gains.items() if gain > 0],
        tasks_lost=[task for task, gain in gains.items() if gain < 0],
    )


@dataclass(frozen=True)
class Conclusion:
    """What `_weigh` came to: the decision, why, and how the candidate would serve."""

    decision: Decision
    reason: str
    cell: Cell
    basis: Basis | None = None
    is_dearer: bool = False


def _doubt(candidate: CellResult, incumbent: CellResult, pairs: Sequence[Pair], config: EvaluationConfig) -> str | None:
    """Return why the measurement says nothing, if it does not."""
    cells = (candidate, incumbent)
    for cell in cells:
        if cell.share("is_broken") > config.max_broken_share:
            return (
                f"{cell.share('is_broken'):.0%} of the episodes of {cell.cell.name!r} broke off or have no reward "
                f"(more than {config.max_broken_share:.0%}): mend the cause and evaluate again"
            )
    if len(pairs) < config.min_tasks:
        return f"{len(pairs)} tasks were played by both, {config.min_tasks} are needed"
    if min(cell.share("is_truncated") for cell in cells) > config.max_truncated_share:
        return f"more than {config.max_truncated_share:.0%} of the episodes of both were cut by a budget: raise it"
    rates = [sum(share_won(side) for side in sides) / len(pairs) for sides in _sides(pairs)]
    if max(rates) <= config.floor:
        return "both fail nearly every task: the tasks are too hard to tell them apart"
    if min(rates) >= 1 - config.floor:
        return "both succeed at nearly every task: the tasks are too easy to tell them apart"
    return None


def _sides(pairs: Sequence[Pair]) -> tuple[list[list[EpisodeSummary]], list[list[EpisodeSummary]]]:
    return [pair.ours for pair in pairs], [pair.theirs for pair in pairs]


def _guard(pairs: Sequence[Pair], config: EvaluationConfig) -> list[Guard]:
    """Measure what must not get worse, like with like.

    Rates are per model call, and model calls are compared on the tasks that both won: a policy that survives longer
    makes more of them in all, and that is not a fault.
    """
    guards = [
        _compare_counts(pairs, "invalid tool calls per turn", "num_invalid_tool_calls", config.max_extra_invalid_rate),
        _compare_counts(pairs, "output tokens per turn", "output_tokens", config.max_tokens_ratio, as_ratio=True),
        _compare_counts(pairs, "prompt tokens per turn", "prompt_tokens", config.max_tokens_ratio, as_ratio=True),
    ]
    both_won = [
        Pair(pair.task, *([episode for episode in side if episode.is_success] for side in (pair.ours, pair.theirs)))
        for pair in pairs
        if share_won(pair.ours) and share_won(pair.theirs)
    ]
    if len(both_won) >= MIN_TASKS_FOR_TURNS:
        means = [[_mean(side, "num_turns") for side in sides] for sides in _sides(both_won)]
        ones = [1.0] * len(both_won)
        turns = compare_rates((means[0], ones), (means[1], ones), as_ratio=True)
        guards.append(_as_guard("turns on tasks both won", turns, config.max_turns_ratio, is_hard=False))
    return guards


def _compare_counts(pairs: Sequence[Pair], name: str, count: str, limit: float, *, as_ratio: bool = False) -> Guard:
    counts = [[_mean(side, count) for side in sides] for sides in _sides(pairs)]
    turns = [[_mean(side, "num_turns") for side in sides] for sides in _sides(pairs)]
    compared = compare_rates((counts[0], turns[0]), (counts[1], turns[1]), as_ratio=as_ratio)
    # A policy that costs more may be worth it; one whose calls are not understood is broken.
    return _as_guard(name, compared, limit, is_hard=not as_ratio)


def _as_guard(name: str, compared: RateComparison, limit: float, *, is_hard: bool) -> Guard:
    low, high = (end if math.isfinite(end) else None for end in (compared.low, compared.high))
    return Guard(name, compared.first, compared.second, low, high, limit, is_hard)


def _mean(tries: Sequence[EpisodeSummary], count: str) -> float:
    return sum(getattr(episode, count) for episode in tries) / len(tries)


def _compare_without_memory(
    ours: CellResult | None, theirs: CellResult, config: EvaluationConfig, alpha: float
) -> NonInferiority | None:
    """Compare the candidate without memory with the incumbent as it serves, if the operator set a margin."""
    if config.noninferiority_margin is None or ours is None:
        return None
    pairs = pair_tasks(ours, theirs)
    if _doubt(ours, theirs, pairs, config) or not _are_kept(_guard(pairs, config)):
        return None
    confidence = 1 - 2 * alpha / 2  # one-sided, with half of the look's share: the other half is for "better"
    paired = compare_pairs(pairs, confidence)
    saved = [_tokens_per_episode(pair.theirs) - _tokens_per_episode(pair.ours) for pair in pairs]
    mean, low, _ = mean_interval(saved, confidence)
    lowest = low if math.isfinite(low) else None
    return NonInferiority(ours.cell, paired.difference, paired.low, config.noninferiority_margin, mean, lowest)


def _tokens_per_episode(tries: Sequence[EpisodeSummary]) -> float:
    return _mean(tries, "prompt_tokens") + _mean(tries, "output_tokens")


def _are_kept(guards: Iterable[Guard]) -> bool:
    return all(guard.is_kept for guard in guards if guard.is_hard)


def _list_objections(guards: Iterable[Guard]) -> str:
    return "; ".join(
        f"{g.name} {g.candidate:.3g} against {g.incumbent:.3g} "
        f"({'difference' if g.is_hard else 'ratio'} at least {g.low:.3g}, limit {g.limit:.3g})"
        for g in guards
        if not g.is_kept
    )


def _weigh(
    cell: Cell,
    pairs: Sequence[Pair],
    paired: PairedDifference,
    guards: Sequence[Guard],
    no_worse: NonInferiority | None,
    config: EvaluationConfig,
    alpha: float,
) -> Conclusion:
    """Decide on a measurement that can be trusted."""
    share = alpha if config.noninferiority_margin is None else alpha / 2
    bound = compare_pairs(pairs, 1 - 2 * share).low
    is_better = paired.p_better <= share and bound > config.margin
    numbers = (
        f"{paired.difference:+.1%} (95 % interval {paired.low:+.1%} to {paired.high:+.1%}; "
        f"one-sided p = {paired.p_better:.2g}, at most {share:.2g} promotes)"
    )
    objections, hard = _list_objections(guards), not _are_kept(guards)
    if is_better and not hard and (config.allow_dearer or not objections):
        reason = f"better on the same tasks: {numbers}" + (f"; it is dearer: {objections}" if objections else "")
        return Conclusion(Decision.PROMOTE, reason, cell, Basis.BETTER, is_dearer=bool(objections))
    if no_worse is not None and no_worse.holds:
        saving = f"{no_worse.tokens_saved:.0f} tokens an episode fewer (at least {no_worse.tokens_saved_low:.0f})"
        lost = f"loses at most {-no_worse.low:.1%} of the tasks, margin {no_worse.margin:.1%}"
        reason = f"no worse and cheaper without memory: {lost}; {saving}"
        return Conclusion(Decision.PROMOTE, reason, no_worse.cell, Basis.NO_WORSE)
    if hard or (is_better and objections):
        return Conclusion(Decision.REJECT, f"a guard metric got worse: {objections}; {numbers}", cell)
    if paired.high < 0:
        return Conclusion(Decision.REJECT, f"worse on the same tasks: {numbers}", cell)
    if paired.high < config.margin:
        return Conclusion(Decision.REJECT, f"shown not to be better by {config.margin:.1%}: {numbers}", cell)
    reason = f"not shown to be better by more than {config.margin:.1%}: {numbers}"
    return Conclusion(Decision.UNINFORMATIVE, reason, cell)
