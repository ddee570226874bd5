"""The few statistics that a verdict stands on: intervals for a share, for a paired difference, and an exact test.

Refuses to know what was measured. All intervals are two-sided, 95 % unless asked otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000


def wilson(num_successes: int, num_tries: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's score interval for a share; (0, 1) when nothing was tried."""
    if num_tries == 0:
        return 0.0, 1.0
    z = norm.ppf((1 + confidence) / 2)
    share = num_successes / num_tries
    centre = share + z * z / (2 * num_tries)
    spread = z * math.sqrt(share * (1 - share) / num_tries + z * z / (4 * num_tries**2))
    scale = 1 + z * z / num_tries
    return max(0.0, float((centre - spread) / scale)), min(1.0, float((centre + spread) / scale))


@dataclass(frozen=True)
class PairedDifference:
    """How the success of one policy differs from another's on the same tasks."""

    num_tasks: int
    num_won: int
    """Tasks that only the first won."""
    num_lost: int
    """Tasks that only the second won."""
    difference: float
    low: float
    high: float
    p_value: float
    """Exact McNemar test, two-sided."""


def compare_paired(first: Sequence[bool], second: Sequence[bool], confidence: float = CONFIDENCE) -> PairedDifference:
    """Compare two policies on the same tasks.

    The interval is Newcombe's for paired proportions (Statistics in Medicine 17, 1998, method 10), which unlike a
    bootstrap stays honest when few tasks differ: with none at all it still has a width. The p-value is the exact sign
    test on the tasks that differ (McNemar).
    """
    both = sum(a and b for a, b in zip(first, second, strict=True))
    won = sum(a and not b for a, b in zip(first, second, strict=True))
    lost = sum(b and not a for a, b in zip(first, second, strict=True))
    num_tasks = len(first)
    if num_tasks == 0:
        return PairedDifference(0, 0, 0, 0.0, -1.0, 1.0, 1.0)
    neither = num_tasks - both - won - lost
    low, high = _newcombe(both, won, lost, neither, confidence)
    p_value = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return PairedDifference(num_tasks, won, lost, (won - lost) / num_tasks, low, high, float(p_value))


def _newcombe(both: int, won: int, lost: int, neither: int, confidence: float) -> tuple[float, float]:
    num = both + won + lost + neither
    first, second = (both + won) / num, (both + lost) / num
    first_low, first_high = wilson(both + won, num, confidence)
    second_low, second_high = wilson(both + lost, num, confidence)
    margins = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    covariance = both * neither - won * lost
    if covariance > 0:
        covariance = max(covariance - num / 2, 0.0)  # Newcombe's continuity correction
    phi = covariance / math.sqrt(margins) if margins else 0.0
    below = (first - first_low, second_high - second)
    above = (second - second_low, first_high - first)
    difference = first - second
    return difference - _hypotenuse(*below, phi), difference + _hypotenuse(*above, phi)


def _hypotenuse(a: float, b: float, correlation: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))


def bootstrap_mean(
    values: Sequence[float], seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Return (mean, low, high) by the percentile bootstrap; for differences of tokens and turns."""
    if not values:
        return 0.0, 0.0, 0.0
    array = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(array), size=(NUM_RESAMPLES, len(array)))
    means = array[picks].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(array.mean()), float(low), float(high)
