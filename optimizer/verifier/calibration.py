"""Turns a verifier's margins into probabilities, and measures them.

A margin is log p(yes) - log p(no). Pure functions; arrays are one number an episode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from memory.statistics import wilson_interval

NUM_RESAMPLES = 2_000


@dataclass(frozen=True)
class Calibration:
    """Platt's map from a margin to a probability, and the probability from which on an episode counts as a success."""

    slope: float
    offset: float
    threshold: float

    def probabilities(self, margins: Sequence[float]) -> np.ndarray:
        """Return the probability of success of each episode."""
        return expit(self.slope * np.asarray(margins, dtype=float) + self.offset)

    def decide(self, margins: Sequence[float]) -> np.ndarray:
        """Return whether each episode counts as a success."""
        return self.probabilities(margins) >= self.threshold


def fit(margins: Sequence[float], labels: Sequence[bool]) -> Calibration:
    """Return the calibration of a part that nothing was trained on and nothing is measured on.

    Platt scaling (Platt 1999) with its smoothed targets, so that a part that is separated perfectly has a finite slope.
    The slope is never negative: a verifier that is wrong more often than right is worth nothing, not the opposite. The
    threshold is the one with the best balanced accuracy, whatever the share of successes.
    """
    x, y = np.asarray(margins, dtype=float), np.asarray(labels, dtype=bool)
    num_good, num_bad = int(y.sum()), int((~y).sum())
    targets = np.where(y, (num_good + 1) / (num_good + 2), 1 / (num_bad + 2))

    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] * x + parameters[1]
        return float((np.logaddexp(0, logits) - targets * logits).sum())

    found = minimize(loss, np.array([1.0, 0.0]), method="L-BFGS-B", bounds=[(0.0, None), (None, None)])
    slope, offset = map(float, found.x)
    probabilities = expit(slope * x + offset)
    return Calibration(slope, offset, _choose_threshold(probabilities, y))


def _choose_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the midpoint between two neighbouring probabilities with the best balanced accuracy."""
    levels = np.unique(probabilities)
    candidates = (levels[1:] + levels[:-1]) / 2 if len(levels) > 1 else levels
    scores = [
        (probabilities[labels] >= each).mean() + (probabilities[~labels] < each).mean() for each in candidates.tolist()
    ]
    return float(candidates[int(np.argmax(scores))])


def measure_auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return how likely a success has the higher score than a failure; a tie counts half (Mann and Whitney)."""
    y = np.asarray(labels, dtype=bool)
    num_good, num_bad = int(y.sum()), int((~y).sum())
    ranks = rankdata(np.asarray(scores, dtype=float))
    return float((ranks[y].sum() - num_good * (num_good + 1) / 2) / (num_good * num_bad))


def auc_interval(
    scores: Sequence[float], labels: Sequence[bool], tasks: Sequence[object], seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the AUC, by a bootstrap over tasks: episodes of one task resemble each other."""
    x, y = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    # A resample of one kind alone has no AUC.
    values = [
        measure_auc(x[picked].tolist(), y[picked].tolist())
        for picked in _resample(tasks, seed)
        if 0 < y[picked].sum() < len(picked)
    ]
    low, high = np.quantile(values, [0.025, 0.975]) if values else (0.0, 1.0)
    return float(low), float(high)


def share_interval(is_right: Sequence[bool], tasks: Sequence[object], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a share of episodes, by the same bootstrap; never narrower than Wilson's over
    episodes, which has a width where all of them are alike."""
    right = np.asarray(is_right, dtype=float)
    low, high = np.quantile([right[picked].mean() for picked in _resample(tasks, seed)], [0.025, 0.975])
    least, most = wilson_interval(sum(is_right), len(is_right))
    return min(float(low), least), max(float(high), most)


def _resample(tasks: Sequence[object], seed: int) -> Iterator[np.ndarray]:
    """Yield the positions of the episodes of as many tasks as there are, drawn with replacement."""
    by_task: dict[object, list[int]] = {}
    for position, task in enumerate(tasks):
        by_task.setdefault(task, []).append(position)
    groups = [np.asarray(positions) for positions in by_task.values()]
    random = np.random.default_rng(seed)
    for _ in range(NUM_RESAMPLES):
        yield np.concatenate([groups[number] for number in random.integers(0, len(groups), len(groups))])


def measure_brier(probabilities: np.ndarray, labels: Sequence[bool]) -> float:
    """Return the mean squared difference between probability and outcome; 0 is best, always 0.5 gives 0.25."""
    return float(((probabilities - np.asarray(labels, dtype=float)) ** 2).mean())
