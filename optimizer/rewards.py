"""Graded trajectories: each rewarded trajectory with its steps, and the split into successes and failures.

Nothing is scored here. Rewards are rows, and memory decides which of several counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import datetime

from memory.records.feedback import Correction
from memory.records.trajectories import GradedTrajectory
from memory.schema import Split
from memory.store import Memory
from memory.teaching import Teacher


def grade(
    memory: Memory,
    *,
    since: datetime | None = None,
    environment: str | None = None,
    environments: Collection[str] | None = None,
    limit: int | None = None,
    is_for_weights: bool = False,
    with_branches: bool = False,
) -> list[GradedTrajectory]:
    """Return the learnable trajectories with their steps, oldest first; of more than `limit`, the newest of each
    teacher. With `is_for_weights`, by the rewards of those who may teach the weights alone.

    With `environments`, only episodes of those; `""` among them stands for live traffic. Reads the database: call it
    in a thread when there may be many.
    """
    learnable = memory.trajectories.learnable(
        since=since,
        environment=environment,
        environments=environments,
        is_for_weights=is_for_weights,
        with_branches=with_branches,
    )
    # by id, not by time: ids sort by a sequence that a clock set back does not reverse (memory/schema.py, new_id)
    learnable.sort(key=lambda graded: graded.trajectory.id)
    newest = learnable if limit is None else choose_newest(learnable, limit)
    # steps last, and of the chosen ones only: they hold the token ids, thousands a row
    graded = [replace(each, steps=memory.trajectories.steps(each.trajectory.id)) for each in newest]
    # the last line of defence, by the split on the row alone; tasks held out by name are dropped in cycle/context.py
    refuse_held_out(graded)
    return graded


def choose_newest(learnable: list[GradedTrajectory], limit: int) -> list[GradedTrajectory]:
    """Return `limit` of these, oldest first: the newest, from each teacher in turn. One who rewards thousands must not
    push out the episodes that others rewarded."""
    # round robin over teachers: rank within a teacher first, age second
    num_newer: Counter[Teacher] = Counter()
    ranked = []
    for age, each in enumerate(reversed(learnable)):
        ranked.append((num_newer[each.teacher], age, each))
        num_newer[each.teacher] += 1
    ranked.sort(key=lambda entry: entry[:2])
    return [each for _, _, each in sorted(ranked[:limit], key=lambda entry: -entry[1])]


def split(graded: Iterable[GradedTrajectory]) -> tuple[list[GradedTrajectory], list[GradedTrajectory]]:
    """Return (successes, failures)."""
    graded = list(graded)
    return [each for each in graded if each.is_success], [each for each in graded if not each.is_success]


def refuse_held_out(graded: Iterable[GradedTrajectory | Correction]) -> None:
    """Raise AssertionError for a held-out episode: a gate that measures on training data measures nothing."""
    # raised, not skipped: a held-out episode here means that a query above has a hole
    for each in graded:
        if each.trajectory.split is Split.HELD_OUT:
            raise AssertionError(
                f"trajectory {each.trajectory.id!r} is of the held-out task {each.trajectory.task!r}; "
                "nothing may be learned from it"
            )
