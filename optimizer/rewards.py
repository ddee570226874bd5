"""Grades: brings each rewarded trajectory together with its steps, and splits successes from failures.

Refuses to judge by itself: rewards are rows (environment, code, user, judge), and memory says which of them counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memory.feedback import Correction
from memory.schema import Split, Step, StepKind, Trajectory


@dataclass(frozen=True)
class GradedTrajectory:
    """One closed trajectory, whole, with the reward that counts."""

    trajectory: Trajectory
    steps: list[Step]
    reward: float
    is_success: bool

    @property
    def model_steps(self) -> list[Step]:
        return [step for step in self.steps if step.kind is StepKind.MODEL]


def grade(
    memory: Any,
    *,
    since: datetime | None = None,
    environment: str | None = None,
    environments: Collection[str] | None = None,
    limit: int | None = None,
) -> list[GradedTrajectory]:
    """Return the learnable trajectories with their steps, oldest first; of more than `limit`, the newest.

    With `environments`, only episodes of those; `""` among them stands for live traffic. Reads the database: call it
    in a thread when there may be many.
    """
    found = memory.trajectories.learnable(since=since, environment=environment, environments=environments)
    learnable = sorted(found, key=lambda graded: graded.trajectory.id)
    newest = learnable if limit is None else learnable[max(0, len(learnable) - limit) :]
    graded = [
        GradedTrajectory(each.trajectory, memory.trajectories.steps(each.trajectory.id), each.reward, each.is_success)
        for each in newest
    ]
    refuse_held_out(graded)
    return graded


def split(graded: Iterable[GradedTrajectory]) -> tuple[list[GradedTrajectory], list[GradedTrajectory]]:
    """Return (successes, failures)."""
    graded = list(graded)
    return [each for each in graded if each.is_success], [each for each in graded if not each.is_success]


def refuse_held_out(graded: Iterable[GradedTrajectory | Correction]) -> None:
    """Stop everything when a held-out episode is about to be learned from: the gate would measure its own teacher."""
    for each in graded:
        if each.trajectory.split is Split.HELD_OUT:
            raise AssertionError(
                f"trajectory {each.trajectory.id!r} is of the held-out task {each.trajectory.task!r}; "
                "nothing may be learned from it"
            )
