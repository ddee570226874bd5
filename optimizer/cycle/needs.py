"""Counts what a cycle will need before anything is played: demonstrations, preferences, labels.

A count is what is logged and the most that playing can add, so a cycle is rejected only where it cannot train whatever
its practice brings. The exact rows are built later, by `optimizer.data`, which may leave some out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from memory.formats.content import ExampleKind
from memory.records.feedback import Correction
from memory.records.trajectories import GradedTrajectory
from memory.schema import Trajectory
from memory.statistics import wilson_interval
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.errors import CannotReplay, TooFewTrajectories, TrainingDoesNotFit

CAPACITY = "room to train"
"""The name of the need for memory on a GPU; shown by the HTTP API."""
REPLAY = "replay"
"""The name of the need for an environment that can be replayed."""


@dataclass(frozen=True)
class Need:
    """One thing that a cycle needs, and how much of it there is."""

    name: str
    needed: int
    available: int
    playable: int = 0
    """How many playing can add at the most."""
    is_required: bool = False
    """Without it the cycle cannot train."""
    detail: str = ""
    mend: str = ""

    @property
    def num_missing(self) -> int:
        return max(0, self.needed - self.available - self.playable)

    @property
    def is_met(self) -> bool:
        return self.num_missing == 0

    def to_json(self) -> dict[str, object]:
        # num_missing is a property, which asdict leaves out
        return {**asdict(self), "num_missing": self.num_missing}


@dataclass(frozen=True)
class LoggedData:
    """Everything in the log that weights may learn from in a cycle with these settings."""

    learnable: Sequence[GradedTrajectory]
    corrections: Sequence[Correction]
    active: int
    """The version of the policy that will play."""
    config: OptimizerConfig
    num_imported: Mapping[ExampleKind, int] = field(default_factory=dict)
    """Imported examples by kind."""
    num_imported_good: int = 0
    """Imported labels that say "good"."""

    @classmethod
    def read(cls, memory: Memory, config: OptimizerConfig) -> LoggedData:
        """Read the database: call this in a thread."""
        environments = config.pool_environments
        return cls(
            memory.trajectories.learnable(environments=environments, is_for_weights=True),
            memory.feedback.corrections(limit=config.max_pool, environments=environments, is_for_weights=True),
            memory.policies.active().version,
            config,
            {kind: memory.examples.count_learnable(kind, environments=environments) for kind in ExampleKind},
            memory.examples.count_learnable(ExampleKind.LABEL, environments=environments, is_good=True),
        )


def require_needs(needs: Iterable[Need]) -> None:
    """Raise TrainingDoesNotFit, CannotReplay or TooFewTrajectories for a required need that is not met."""
    for need in needs:
        if need.is_met or not need.is_required:
            continue
        if need.name == CAPACITY:
            raise TrainingDoesNotFit(need.detail)
        if need.name == REPLAY:
            raise CannotReplay(need.detail)
        raise TooFewTrajectories(explain(need), num_missing=need.num_missing)


def explain(need: Need) -> str:
    """Return the missing number and its remedy in one sentence."""
    return (
        f"{need.detail}; {need.needed} {need.name} are needed and playing can add {need.playable} at the most: "
        f"{need.num_missing} are missing; {need.mend}"
    )


MeasureNeed = Callable[[LoggedData, Sequence[int]], Need]
"""(logged episodes, rounds of practice to come) -> the rows that a method needs and those it can get."""


def require_reachable(
    memory: Memory, config: OptimizerConfig, measure_need: MeasureNeed, rounds_left: Sequence[int]
) -> None:
    """Check that the remaining rounds can still bring enough rows. Reads the database: call it in a thread.

    Raises:
        TooFewTrajectories: they cannot.
    """
    require_needs([replace(measure_need(LoggedData.read(memory, config), rounds_left), is_required=True)])


def need_demonstrations(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for rows to imitate, with `rounds` of practice still to be played."""
    learnable, corrections, config = logged.learnable, logged.corrections, logged.config
    corrected = {each.trajectory.id for each in corrections}
    successes = [each.trajectory for each in learnable if each.is_success]
    # must leave in all that data/demonstrations.py may take: counted too low, a cycle that could train is rejected.
    # Length and template are not known yet
    imitable = [it for it in successes if it.may_teach and not it.num_invalid_tool_calls and it.id not in corrected]
    taught = [each.trajectory for each in corrections if each.trajectory.may_teach]
    per_task, corrections_per_task = config.demonstrations.per_task, config.teaching.corrections_per_task
    num_corrections = _count_capped(taught, corrections_per_task)
    available = _count_capped(imitable, per_task) + num_corrections
    # more corrections of one task are taken where rows would lack otherwise
    num_lacking = max(0, config.demonstrations.min_rows - available)
    available += min(len(taught) - num_corrections, num_lacking)
    num_imported = logged.num_imported.get(ExampleKind.DEMONSTRATION, 0)
    available += num_imported
    playable, record = _count_playable(logged, rounds)
    play = "play more practice_episodes" if config.environment else "name an environment to practise in"
    return Need(
        name="demonstrations",
        needed=config.demonstrations.min_rows,
        available=available,
        playable=playable,
        detail=f"{len(successes)} of {len(learnable)} rewarded trajectories are successes, {len(corrections)} replies "
        f"were corrected and {num_imported} demonstrations imported, which makes {available} demonstrations (of one "
        f"task at most {per_task} successes count)"
        f"{record}",
        mend=f"{play}, give feedback (with keys, with one that has the scope 'teach') or corrections, import "
        "demonstrations for it, or lower demonstrations.min_rows",
    )


def _count_playable(logged: LoggedData, rounds: Sequence[int]) -> tuple[int, str]:
    """Return how many demonstrations these rounds of practice bring at the most, and the basis of that estimate.

    A policy that never won gets no lessons from its failures, so its next episodes will not do better than the upper
    end of what it showed. One that won may learn from one round to the next: it is bounded by the caps alone.
    """
    config, active = logged.config, logged.active
    # a round plays each of its tasks once: the longest per_task rounds together give each task its most successes
    most = sum(sorted(rounds, reverse=True)[: config.demonstrations.per_task])
    tries = [
        each
        for each in logged.learnable
        if each.trajectory.environment == config.environment and each.trajectory.policy == active
    ]
    num_won = sum(each.is_success for each in tries)
    if not tries or num_won:
        return most, ""
    likely = math.ceil(wilson_interval(0, len(tries))[1] * sum(rounds))
    # the upper end of the interval, not the mean: a cycle is rejected only if it cannot work
    return min(most, likely), f"; v{active} won none of {len(tries)} episodes of {config.environment!r}"


def need_preferences(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for pairs of replies. Rounds of practice are not counted: they may bring no contrast."""
    learnable, config = logged.learnable, logged.config
    wanted = config.preferences
    # a pair takes two episodes of one task, a win and a loss
    num_explored = min(config.explore_episodes // 2, config.num_practice_tasks)
    # on the same task: different tasks give no pair
    won, lost = (
        Counter(each.trajectory.task_key for each in learnable if each.is_success is outcome)
        for outcome in (True, False)
    )
    contrasts = won.keys() & lost.keys()
    if config.explore_episodes:
        available, playable = 0, num_explored * wanted.per_task
        detail = "pairs of a win and a loss of the same task come from exploring with the SFT policy"
    else:
        available, playable = sum(min(wanted.per_task, won[task] * lost[task]) for task in contrasts), 0
        detail = f"{len(contrasts)} tasks were won at least once and lost at least once"
    if num_imported := logged.num_imported.get(ExampleKind.PREFERENCE, 0):
        detail += f"; {num_imported} were imported"
    return Need(
        name="preferences",
        needed=wanted.min_rows,
        available=available + num_imported,
        playable=playable,
        detail=detail,
        mend="without them there is no DPO and the SFT policy is the candidate; have the same tasks tried several "
        "times, or raise explore_episodes",
    )


def need_labels(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for good and for bad examples, which need no pair: that of the rarer of the two."""
    learnable, config = logged.learnable, logged.config
    wanted = config.labels
    usable = [each for each in learnable if each.trajectory.may_teach]
    num_good, num_bad = (
        _count_capped((each.trajectory for each in usable if each.is_success is outcome), wanted.per_task)
        for outcome in (True, False)
    )
    num_imported = logged.num_imported.get(ExampleKind.LABEL, 0)
    num_good += logged.num_imported_good
    num_bad += num_imported - logged.num_imported_good
    return Need(
        name="labels",
        needed=wanted.min_rows,
        available=min(num_good, num_bad),
        # all of them may be of the rarer kind
        playable=sum(rounds) + config.explore_episodes,
        detail=f"{num_good} rewarded trajectories or imported labels are good examples and {num_bad} are bad ones (of "
        f"one task at most {wanted.per_task} trajectories of each count); the rarer of the two decides",
        mend="give feedback on more answers, on good and on bad ones (with keys, with one that has the scope 'teach'), "
        "or lower labels.min_rows",
    )


def need_groups(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for tasks whose rollouts differ in reward, all of them still to be played."""
    wanted, num_tasks = logged.config.groups, logged.config.num_practice_tasks
    return Need(
        name="groups",
        needed=wanted.min_rows,
        available=0,
        playable=min(wanted.num_tasks, num_tasks),
        detail=f"each round tries {min(wanted.num_tasks, num_tasks)} practice tasks {wanted.num_tries} times; those "
        "whose tries are rewarded differently count",
        mend="raise groups.num_tasks and num_practice_tasks, or lower groups.min_rows",
    )


def need_rollouts(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for own rollouts of tasks for which memory has something to show, all still to be played."""
    wanted, num_tasks = logged.config.rollouts, logged.config.num_practice_tasks
    playable = min(wanted.num_tasks, num_tasks) * wanted.num_tries
    return Need(
        name="rollouts",
        needed=wanted.min_rows,
        available=0,
        playable=playable,
        detail=f"each round plays {playable} rollouts without memory and as many with it; those of tasks with a memory "
        "count, if memory wins more",
        mend="raise rollouts.num_tasks or rollouts.num_tries, or lower rollouts.min_rows",
    )


def need_branches(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for preferences between continuations, all of them still to be played."""
    wanted, num_tasks = logged.config.branches, logged.config.num_practice_tasks
    num_own = min(wanted.num_tasks, num_tasks) * wanted.num_tries
    num_branches = wanted.num_points * wanted.num_ways * wanted.num_rollouts
    return Need(
        name="branches",
        needed=wanted.min_rows,
        available=0,
        # of a point at the most: one half of its continuations better than each of the other half
        playable=wanted.num_points * (wanted.num_ways**2 // 4),
        detail=f"each of {wanted.rounds} rounds plays {num_own} own episodes and at most {num_branches} branches of "
        f"them ({wanted.num_points} steps, {wanted.num_ways} ways on from each, {wanted.num_rollouts} episodes for a "
        f"way), {wanted.rounds * (num_own + num_branches)} episodes at the most in all",
        mend="raise branches.num_points or branches.num_ways, or lower branches.min_rows",
    )


def _count_capped(trajectories: Iterable[Trajectory], per_task: int) -> int:
    return sum(min(per_task, number) for number in Counter(it.task_key for it in trajectories).values())
