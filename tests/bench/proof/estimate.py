"""A mean over seeds and tasks with its interval, where every seed plays the same tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95

Cell = Mapping[str, float]
"""Task -> the share of its tries that were won, or a difference of two such shares."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and tasks, with its interval; in shares of tasks."""

    mean: float
    low: float
    high: float
    num_seeds: int

    def __str__(self) -> str:
        # without any variance nothing is known of the next run
        interval = f"{100 * self.low:.1f} to {100 * self.high:.1f}" if self.low < self.high else "unknown"
        return f"{100 * self.mean:.1f} | {interval} | {self.num_seeds}"


def estimate(of_seeds: Sequence[Cell]) -> Estimate:
    """Return the mean over the tasks that all seeds played.

    Seeds and tasks are crossed random effects of an analysis of variance without repetitions; the interval is
    Student's, with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946). With one seed it is over tasks.
    """
    tasks = [task for task in of_seeds[0] if all(task in cell for cell in of_seeds)]
    won = np.array([[cell[task] for task in tasks] for cell in of_seeds])  # (num_seeds, num_tasks)
    variance, freedom = _variance_of_one_seed(won[0]) if len(won) == 1 else _variance_of_seeds(won)
    mean = float(won.mean())
    margin = float(student.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance)) if variance else 0.0
    return Estimate(mean, mean - margin, mean + margin, len(won))


def _variance_of_one_seed(won: np.ndarray) -> tuple[float, float]:
    return float(won.var(ddof=1) / won.size), won.size - 1


def _variance_of_seeds(won: np.ndarray) -> tuple[float, float]:
    """Return the variance of the mean, and its degrees of freedom."""
    num_seeds, num_tasks = won.shape
    by_seed, by_task = won.mean(axis=1), won.mean(axis=0)
    rest = won - by_seed[:, None] - by_task[None, :] + won.mean()
    of_rest = (rest**2).sum() / ((num_seeds - 1) * (num_tasks - 1))
    # a component is not negative, so no mean square is below that of the rest
    of_seeds = max(num_tasks * by_seed.var(ddof=1), of_rest)
    of_tasks = max(num_seeds * by_task.var(ddof=1), of_rest)
    total = of_seeds + of_tasks - of_rest
    if not total:
        return 0.0, 1.0
    spread = of_seeds**2 / (num_seeds - 1) + of_tasks**2 / (num_tasks - 1)
    spread += of_rest**2 / ((num_seeds - 1) * (num_tasks - 1))
    return float(total / won.size), float(total**2 / spread)
