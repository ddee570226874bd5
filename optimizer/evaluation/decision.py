"""Decides by two cells, played on the same held-out tasks: promote, reject or uninformative.

The rule. The active policy has an error budget, `false_promotion_rate`: how likely it is ever replaced by a candidate
that is no better. The k-th comparison with it, its k-th look, spends `budget * 6 / (pi^2 k^2)`; all looks together
spend no more than the budget (alpha spending: Lan and DeMets, Biometrika 70, 1983; Bonferroni over an unbounded
sequence). A promotion makes another policy the incumbent, with a budget of its own, as in alpha-investing (Foster and
Stine, JRSS B 70, 2008). The test of one look is the exact randomization test over tasks, McNemar's where each task is
tried once. Where clients play, whoever asks for a verdict may have watched the outcomes and chosen the moment: there
test and intervals hold at every moment (`compare_anytime`).

Invariants: a promotion needs a p-value within its look's share of the budget and an interval above the margin; a
rejection needs evidence too; every doubt about the measurement, and all that lies between, is uninformative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial

from optimizer.config import EvaluationConfig
from optimizer.evaluation.cells import Cell, CellResult, HeldOutEpisode, Pair, compare_pairs, pair_tasks, share_won
from optimizer.evaluation.intervals import (
    PairedDifference,
    RateComparison,
    anytime_low,
    compare_rates,
    mean_interval,
)

MIN_TASKS_FOR_CALLS = 10  # with fewer tasks won by both, their model calls are not compared


def alpha_of(look: int, budget: float) -> float:
    """Return the error probability that the `look`-th comparison with an incumbent may spend.

    The sum over all looks is `budget`.
    """
    # the series 1/k^2 sums to pi^2 / 6. `look` starts at 1, and a look is free again if no test was made
    # (memory/records/verdicts.py)
    return budget * 6 / (math.pi**2 * look**2)


class Decision(StrEnum):
    PROMOTE = "promote"
    REJECT = "reject"
    UNINFORMATIVE = "uninformative"


class Basis(StrEnum):
    """The ground for a promotion."""

    BETTER = "better"
    NO_WORSE = "no worse and cheaper"


@dataclass(frozen=True)
class Guard:
    """A metric that must not get worse, or not unnoticed, while success gets better."""

    name: str
    candidate: float
    incumbent: float
    low: float | None
    """95 % interval of their ratio, candidate to incumbent, or of their difference; None: unknown."""
    high: float | None
    limit: float
    """The interval is compared with this."""
    is_hard: bool
    """Whether it rejects a better candidate; other guards only report what the improvement costs."""
    is_ratio: bool = True

    @property
    def is_kept(self) -> bool:
        """Whether the interval reaches below the limit: a guard objects to what was shown, not to noise."""
        return self.low is None or self.low <= self.limit


@dataclass(frozen=True)
class NonInferiority:
    """A comparison of a candidate without memory with the incumbent as it serves."""

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
        # unknown savings count as none
        return self.low > -self.margin and (self.tokens_saved_low or 0.0) > 0


@dataclass(frozen=True)
class Verdict:
    """The decision, its reason, and the numbers behind it."""

    decision: Decision
    reason: str
    candidate: Cell
    """The candidate as it would serve."""
    incumbent: Cell
    paired: PairedDifference
    look: int
    alpha: float
    """The share of the incumbent's error budget that a test at this look spends."""
    was_tested: bool
    """False where the measurement itself was in doubt: then nothing is spent and no task is used up."""
    basis: Basis | None = None
    is_dearer: bool = False
    """It is promoted although a limit of calls or tokens was shown to be exceeded."""
    no_worse: NonInferiority | None = None
    guards: list[Guard] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    """The tasks that were compared."""
    tasks_won: list[str] = field(default_factory=list)
    """Tasks at which the candidate did better."""
    tasks_lost: list[str] = field(default_factory=list)
    """Tasks at which the incumbent did better."""

    def to_json(self) -> dict[str, object]:
        guards = [{**asdict(guard), "is_kept": guard.is_kept} for guard in self.guards]
        # without the tasks: they are stored in the ledger, and a verdict is copied to policy, cycle and report
        rest = {name: value for name, value in asdict(self).items() if name != "tasks"}
        return {**rest, "decision": self.decision.value, "guards": guards}


def decide(
    candidate: CellResult,
    incumbent: CellResult,
    config: EvaluationConfig,
    *,
    look: int = 1,
    without_memory: CellResult | None = None,
    is_open_ended: bool = False,
) -> Verdict:
    """Decide by the tasks that both cells played, at the `look`-th comparison with this incumbent.

    `without_memory`: the candidate without memory, to which a non-inferiority margin applies.
    `is_open_ended`: the number of tasks was not fixed before they were played.
    The order of the questions matters: first whether the measurement can be trusted, then whether success got better
    and at what price, then whether it is no worse and cheaper, and only then whether it got worse.
    """
    pairs = pair_tasks(candidate, incumbent)
    compare = partial(compare_pairs, is_open_ended=is_open_ended)
    paired, alpha = compare(pairs), alpha_of(look, config.false_promotion_rate)
    guards = _measure_guards(pairs, config)
    doubt = _doubt(candidate, incumbent, pairs, config)
    no_worse = None
    if doubt is None:
        no_worse = _compare_without_memory(without_memory, incumbent, config, alpha, is_open_ended=is_open_ended)
        # two tests at one look share its part of the budget (Bonferroni)
        share = alpha if config.noninferiority_margin is None else alpha / 2
        # the lower end of a two-sided interval with `share` in each tail is the one-sided bound at this look's level
        bound = compare(pairs, 1 - 2 * share).low
        conclusion = _weigh(candidate.cell, paired, guards, no_worse, config, share, bound)
    else:
        # not REJECT: a broken measurement must not cost a candidate
        conclusion = Conclusion(Decision.UNINFORMATIVE, doubt, candidate.cell)
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
        tasks=[pair.task for pair in pairs],
        tasks_won=[pair.task for pair in pairs if pair.gain > 0],
        tasks_lost=[pair.task for pair in pairs if pair.gain < 0],
    )


@dataclass(frozen=True)
class Conclusion:
    """The result of `_weigh`: the decision, its reason, and the cell in which the candidate would serve."""

    decision: Decision
    reason: str
    cell: Cell
    basis: Basis | None = None
    is_dearer: bool = False


def _doubt(candidate: CellResult, incumbent: CellResult, pairs: Sequence[Pair], config: EvaluationConfig) -> str | None:
    """Return the reason for which the measurement says nothing; None if it can be trusted."""
    cells = (candidate, incumbent)
    for cell in cells:
        if cell.share("is_broken") > config.max_broken_share:
            return (
                f"{cell.share('is_broken'):.0%} of the episodes of {cell.cell.name!r} broke off or have no reward "
                f"(more than {config.max_broken_share:.0%}): mend the cause and evaluate again"
            )
    num_unpaired = candidate.num_unpaired
    if num_unpaired > config.max_broken_share * (num_unpaired + len(pairs)):
        return (
            f"{num_unpaired} of {num_unpaired + len(pairs)} held-out tasks were tried by one policy alone, or not at "
            "the same temperature and with memory for both or neither: have both try all of them alike"
        )
    if len(pairs) < config.min_tasks:
        return f"{len(pairs)} tasks were played by both, {config.min_tasks} are needed"
    # the smaller share: one policy alone that exhausts its budget is a difference, not a doubt
    if min(cell.share("is_truncated") for cell in cells) > config.max_truncated_share:
        return f"more than {config.max_truncated_share:.0%} of the episodes of both were cut by a budget: raise it"
    # over the pairs: tasks whose tries all broke are no evidence of difficulty
    rates = [sum(share_won(side) for side in sides) / len(pairs) for sides in _sides(pairs)]
    if max(rates) <= config.floor:
        return "both fail nearly every task: the tasks are too hard to tell them apart"
    if min(rates) >= 1 - config.floor:
        return "both succeed at nearly every task: the tasks are too easy to tell them apart"
    return None


def _sides(pairs: Sequence[Pair]) -> tuple[list[list[HeldOutEpisode]], list[list[HeldOutEpisode]]]:
    return [pair.ours for pair in pairs], [pair.theirs for pair in pairs]


def _measure_guards(pairs: Sequence[Pair], config: EvaluationConfig) -> list[Guard]:
    """Compare the metrics that must not get worse, like with like.

    Rates are per model call, and model calls are compared on the tasks that both won: a policy that survives longer
    makes more of them in all, and that is not a fault. A policy that costs more may be worth it; one whose tool calls
    are understood less often than the incumbent's is broken, unless the incumbent calls no tool: then invalid calls are
    the price of having learned to.
    """
    # unknown counts as used to tools
    is_used_to_tools = any(episode.num_calling_tools != 0 for pair in pairs for episode in pair.theirs)
    guards = [
        _compare_counts(
            pairs,
            "invalid tool calls per model call",
            "num_invalid_tool_calls",
            config.max_extra_invalid_rate,
            is_hard=is_used_to_tools,
        ),
        _compare_counts(pairs, "output tokens per model call", "output_tokens", config.max_tokens_ratio, as_ratio=True),
        _compare_counts(pairs, "prompt tokens per model call", "prompt_tokens", config.max_tokens_ratio, as_ratio=True),
    ]
    both_won = [
        Pair(pair.task, *([episode for episode in side if episode.is_success] for side in (pair.ours, pair.theirs)))
        for pair in pairs
        if share_won(pair.ours) and share_won(pair.theirs)
    ]
    if len(both_won) >= MIN_TASKS_FOR_CALLS:
        # means over tries per task: the task is the unit, however many tries it had
        means = [[_mean(side, "num_calls") for side in sides] for sides in _sides(both_won)]
        ones = [1.0] * len(both_won)
        calls = compare_rates((means[0], ones), (means[1], ones), as_ratio=True)
        guards.append(_as_guard("model calls on tasks both won", calls, config.max_turns_ratio))
    return guards


def _compare_counts(
    pairs: Sequence[Pair], name: str, count: str, limit: float, *, as_ratio: bool = False, is_hard: bool = False
) -> Guard:
    counts = [[_mean(side, count) for side in sides] for sides in _sides(pairs)]
    calls = [[_mean(side, "num_calls") for side in sides] for sides in _sides(pairs)]
    compared = compare_rates((counts[0], calls[0]), (counts[1], calls[1]), as_ratio=as_ratio)
    return _as_guard(name, compared, limit, is_hard=is_hard, is_ratio=as_ratio)


def _as_guard(
    name: str, compared: RateComparison, limit: float, *, is_hard: bool = False, is_ratio: bool = True
) -> Guard:
    # JSON has no infinity
    low, high = (end if math.isfinite(end) else None for end in (compared.low, compared.high))
    return Guard(name, compared.first, compared.second, low, high, limit, is_hard, is_ratio)


def _mean(tries: Sequence[HeldOutEpisode], count: str) -> float:
    return sum(getattr(episode, count) for episode in tries) / len(tries)


def _compare_without_memory(
    ours: CellResult | None, theirs: CellResult, config: EvaluationConfig, alpha: float, *, is_open_ended: bool
) -> NonInferiority | None:
    """Compare the candidate without memory with the incumbent as it serves, if the operator set a margin."""
    if config.noninferiority_margin is None or ours is None:
        return None
    pairs = pair_tasks(ours, theirs)
    if _doubt(ours, theirs, pairs, config):
        return None
    # invalid calls are the price of success alone: who is only no worse has none to pay them with
    if not all(guard.is_kept for guard in _measure_guards(pairs, config) if not guard.is_ratio):
        return None
    confidence = 1 - 2 * (alpha / 2)  # one-sided, with half of the look's share: the other half is for "better"
    paired = compare_pairs(pairs, confidence, is_open_ended=is_open_ended)
    tokens = [(_tokens_per_episode(pair.ours), _tokens_per_episode(pair.theirs)) for pair in pairs]
    mean, low, _ = mean_interval([theirs - ours for ours, theirs in tokens], confidence)
    if is_open_ended:
        # tokens have no bounds, the share of them that is saved has: that share of the incumbent's tokens
        shares = [(theirs - ours) / max(ours, theirs, 1.0) for ours, theirs in tokens]
        low = anytime_low(shares, alpha / 2) * sum(theirs for _, theirs in tokens) / len(tokens)
    lowest = low if math.isfinite(low) else None
    return NonInferiority(ours.cell, paired.difference, paired.low, config.noninferiority_margin, mean, lowest)


def _tokens_per_episode(tries: Sequence[HeldOutEpisode]) -> float:
    return _mean(tries, "prompt_tokens") + _mean(tries, "output_tokens")


def _are_kept(guards: Iterable[Guard]) -> bool:
    return all(guard.is_kept for guard in guards if guard.is_hard)


def _list_objections(guards: Iterable[Guard]) -> str:
    return "; ".join(
        f"{g.name} {g.candidate:.3g} against {g.incumbent:.3g} "
        f"({'ratio' if g.is_ratio else 'difference'} at least {g.low:.3g}, limit {g.limit:.3g})"
        for g in guards
        if not g.is_kept
    )


def _weigh(
    cell: Cell,
    paired: PairedDifference,
    guards: Sequence[Guard],
    no_worse: NonInferiority | None,
    config: EvaluationConfig,
    share: float,
    bound: float,
) -> Conclusion:
    """Decide on a measurement that can be trusted.

    `share`: of the error budget, what the test whether it is better may spend. `bound`: the lower end of the difference
    at this level.
    """
    # both: the exact test knows no margin, and the interval is an approximation
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
    # the 95 % interval at every look: the error budget is about promotions
    if paired.high < 0:
        return Conclusion(Decision.REJECT, f"worse on the same tasks: {numbers}", cell)
    if paired.high < config.margin:
        return Conclusion(Decision.REJECT, f"shown not to be better by {config.margin:.1%}: {numbers}", cell)
    reason = f"not shown to be better by more than {config.margin:.1%}: {numbers}"
    return Conclusion(Decision.UNINFORMATIVE, reason, cell)
