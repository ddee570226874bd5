"""Counts what a cycle will need before anything is played: demonstrations, preferences, held-out tasks, room to train.

A count is what is there and what playing can add at the most, so a cycle is refused only where it cannot train whatever
comes of its practice. The exact rows are built later, by `optimizer.data.rows`, which may still leave some out.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memory.records.trajectories import GradedTrajectory
from memory.schema import Split
from optimizer.config import OptimizerConfig
from optimizer.cycle.practice_plan import plan_rounds
from optimizer.errors import TooFewTrajectories, TrainingDoesNotFit
from optimizer.evaluation.intervals import wilson
from optimizer.placement import place_training
from optimizer.seams import Seams

ROOM = "room to train"


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

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "num_missing": self.num_missing}


async def measure_needs(memory: Any, config: OptimizerConfig, seams: Seams | None = None) -> list[Need]:
    """Return what a cycle with these settings needs; with `seams`, also its held-out tasks and the room to train.

    Raises: whatever `seams.tasks` raises for an environment that does not exist.
    """
    rounds = plan_rounds(config.practice_episodes, config.num_practice_tasks)
    needs = await asyncio.to_thread(_measure_rows, memory, config, rounds)
    return needs if seams is None else needs + await measure_surroundings(memory, config, seams)


async def measure_surroundings(memory: Any, config: OptimizerConfig, seams: Seams) -> list[Need]:
    """Return what a cycle needs besides rows: held-out tasks, and room to train. To look for room loads packages.

    Raises: whatever `seams.tasks` raises for an environment that does not exist.
    """
    return [_need_held_out_tasks(config, seams), await _need_room(memory, config, seams)]


def require_needs(needs: Iterable[Need]) -> None:
    """Raise for what is missing of that without which a cycle cannot train: TrainingDoesNotFit, TooFewTrajectories."""
    for need in needs:
        if need.is_met or not need.is_required:
            continue
        if need.name == ROOM:
            raise TrainingDoesNotFit(need.detail)
        raise TooFewTrajectories(explain(need), num_missing=need.num_missing)


def explain(need: Need) -> str:
    """Return what is missing, and how to mend it, in one sentence."""
    return (
        f"{need.detail}; {need.needed} {need.name} are needed and playing can add {need.playable} at the most: "
        f"{need.num_missing} are missing; {need.mend}"
    )


def require_reachable(memory: Any, config: OptimizerConfig, rounds_left: Sequence[int]) -> None:
    """Raise TooFewTrajectories if the rounds that are left cannot bring the demonstrations. Reads the database: for a
    thread."""
    require_needs([_measure_rows(memory, config, rounds_left)[0]])


def _measure_rows(memory: Any, config: OptimizerConfig, rounds: Sequence[int]) -> list[Need]:
    learnable = memory.trajectories.learnable(environments=config.pool_environments, is_for_weights=True)
    corrections = memory.feedback.corrections(
        limit=config.max_pool, environments=config.pool_environments, is_for_weights=True
    )
    return [
        _need_demonstrations(learnable, corrections, config, rounds, memory.policies.active().version),
        _need_preferences(learnable, config),
    ]


def _need_demonstrations(
    learnable: Sequence[GradedTrajectory],
    corrections: Sequence[Any],
    config: OptimizerConfig,
    rounds: Sequence[int],
    active: int,
) -> Need:
    corrected = {each.trajectory.id for each in corrections}
    successes = [each.trajectory for each in learnable if each.is_success]
    imitable = [it for it in successes if it.may_teach and not it.num_invalid_tool_calls and it.id not in corrected]
    taught = [each.trajectory for each in corrections if each.trajectory.may_teach]
    per_task, corrections_per_task = config.demonstrations.per_task, config.teaching.corrections_per_task
    num_corrections = _count_capped(taught, corrections_per_task)
    available = _count_capped(imitable, per_task) + num_corrections
    # more corrections of one task are taken where rows would lack otherwise
    num_lacking = max(0, config.demonstrations.min_rows - available)
    available += min(len(taught) - num_corrections, num_lacking)
    playable, record = _count_playable(learnable, config, rounds, active)
    return Need(
        name="demonstrations",
        needed=config.demonstrations.min_rows,
        available=available,
        playable=playable,
        is_required=True,
        detail=f"{len(successes)} of {len(learnable)} rewarded trajectories are successes, {len(corrections)} replies "
        f"were corrected, which makes {available} demonstrations (of one task at most {per_task} successes count)"
        f"{record}",
        mend="play more practice_episodes, give feedback (with keys, with one that has the scope 'teach') or "
        "corrections, or lower demonstrations.min_rows",
    )


def _count_playable(
    learnable: Sequence[GradedTrajectory], config: OptimizerConfig, rounds: Sequence[int], active: int
) -> tuple[int, str]:
    """Return how many demonstrations these rounds of practice bring at the most, and what that estimate goes by.

    A policy that never won gets no lessons from its failures, so its next episodes will not do better than the upper
    end of what it showed. One that won may learn from one round to the next: it is bounded by the caps alone.
    """
    most = sum(sorted(rounds, reverse=True)[: config.demonstrations.per_task])
    tries = [
        each
        for each in learnable
        if each.trajectory.environment == config.environment and each.trajectory.policy == active
    ]
    num_won = sum(each.is_success for each in tries)
    if not tries or num_won:
        return most, ""
    likely = math.ceil(wilson(0, len(tries))[1] * sum(rounds))
    return min(most, likely), f"; v{active} won none of {len(tries)} episodes of {config.environment!r}"


def _need_preferences(learnable: Sequence[GradedTrajectory], config: OptimizerConfig) -> Need:
    wanted = config.preferences
    num_explored = min(config.explore_episodes // 2, config.num_practice_tasks)
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
    return Need(
        name="preferences",
        needed=wanted.min_rows,
        available=available,
        playable=playable,
        detail=detail,
        mend="without them there is no DPO and the SFT policy is the candidate; have the same tasks tried several "
        "times, or raise explore_episodes",
    )


def _need_held_out_tasks(config: OptimizerConfig, seams: Seams) -> Need:
    wanted = config.evaluation
    if not config.environment:
        return Need(
            name="held-out tasks",
            needed=wanted.min_tasks,
            available=0,
            playable=wanted.min_tasks,
            detail="clients play them as the candidate and as the active policy; `judge` decides then",
        )
    num_tasks = count_gate_tasks(config, seams.serving(config.environment).temperature)
    available = len(seams.tasks(config.environment, Split.HELD_OUT, num_tasks))
    return Need(
        name="held-out tasks",
        needed=wanted.min_tasks,
        available=available,
        detail=f"the gate plays {available} tasks of {config.environment!r}",
        mend="with fewer no verdict is possible and the candidate waits: raise evaluation.num_tasks",
    )


def count_gate_tasks(config: OptimizerConfig, serving_temperature: float) -> int:
    """Return how many tasks the gate plays: half as many where the contestants try each several times."""
    wanted = config.evaluation
    temperature = serving_temperature if wanted.temperature is None else wanted.temperature
    return max(wanted.num_tasks // 2, 1) if temperature > 0 and wanted.num_tries > 1 else wanted.num_tasks


async def _need_room(memory: Any, config: OptimizerConfig, seams: Seams) -> Need:
    try:
        placement = await place_training(memory, config, seams)
    except ValueError as error:  # no GPU has the memory, or the base's files are not here
        return Need(ROOM, 1, 0, is_required=True, detail=str(error), mend="until then nothing is learned")
    return Need(ROOM, 1, 1, is_required=True, detail=str(placement))


def _count_capped(trajectories: Iterable[Any], per_task: int) -> int:
    return sum(min(per_task, number) for number in Counter(it.task_key for it in trajectories).values())
