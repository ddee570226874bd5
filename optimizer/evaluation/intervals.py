"""The few statistics that a verdict stands on: the exact sign-flip test, a test that may be read at any time, and
intervals for a paired difference, a mean and a comparison of rates. That of a share is
`memory.statistics.wilson_interval`.

All intervals are two-sided, 95 % unless asked otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

CONFIDENCE = 0.95
MAX_TRIES = 1000  # shares of successful tries are fractions with at most this denominator
NUM_RESAMPLES = 10_000
NUM_STAKES = 1000
BISECTIONS = 20  # of an interval of length 2: to a millionth


@dataclass(frozen=True)
class PairedDifference:
    """How the success of one policy differs from another's on the same tasks; interval and p-values are those of
    `compare_paired`, or of `compare_anytime` where the number of tasks was not fixed before."""

    num_tasks: int
    num_won: int
    """Tasks at which the first did better; with one try of each, those that only the first won."""
    num_lost: int
    """Tasks at which the second did better."""
    difference: float
    low: float
    high: float
    p_value: float
    """Exact sign-flip test, two-sided; with one try of each task it is the exact McNemar test."""
    p_better: float
    """The same, one-sided: how likely a difference this good is when nothing changed."""


def compare_paired(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> PairedDifference:
    """Compare two policies on the same tasks, each given by its share of successful tries per task.

    Tries of one task resemble each other, so the task is the unit. The interval is Bonett and Price's for paired
    proportions (British Journal of Mathematical and Statistical Psychology 65, 2012): a Wald interval after one more
    won and one more lost task, which keeps a width where no task differs. Used on shares of several tries it is the
    same interval over tasks. The p-values flip the signs of the differences (Fisher's randomization test), in full.
    """
    num_tasks = len(first)
    differences = np.subtract(np.asarray(first, dtype=float), np.asarray(second, dtype=float))
    if num_tasks == 0:
        # no task: the widest interval, not the mean of an empty array
        return PairedDifference(0, 0, 0, 0.0, -1.0, 1.0, 1.0, 1.0)
    low, high = _bonett_price(differences, confidence)
    steps = tuple(sorted(_in_steps(differences)))
    better, worse = flip_signs(steps), flip_signs(tuple(sorted(-step for step in steps)))
    return PairedDifference(
        num_tasks=num_tasks,
        num_won=int((differences > 0).sum()),
        num_lost=int((differences < 0).sum()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_value=min(1.0, 2 * min(better, worse)),
        p_better=better,
    )


def _bonett_price(differences: np.ndarray, confidence: float) -> tuple[float, float]:
    # num_tasks + 2 in the mean and in the root, as in the paper
    padded = np.append(differences, [1.0, -1.0])
    mean = padded.mean()
    spread = norm.ppf((1 + confidence) / 2) * math.sqrt(((padded**2).mean() - mean**2) / len(padded))
    return max(-1.0, float(mean - spread)), min(1.0, float(mean + spread))


def _in_steps(differences: np.ndarray) -> list[int]:
    """Return the differences that are not zero as whole multiples of the finest step among them."""
    # floats such as 0.75 - 0.5 are near multiples of the step: rounded back to fractions before they are made whole
    exact = [Fraction(value).limit_denominator(MAX_TRIES) for value in differences.tolist() if value]
    unit = math.lcm(*(value.denominator for value in exact)) if exact else 1
    return [int(value * unit) for value in exact]


@lru_cache(maxsize=4096)
def flip_signs(steps: tuple[int, ...]) -> float:
    """Return how likely the sum is at least as high when each step's sign is a fair coin's; exact."""
    sizes = [abs(step) for step in steps]
    # cost: the number of tasks times the sum of the steps; with four tries of each task, a step is at most 4
    ways = np.ones(1)  # probability of each sum, from -sum(so far) to +sum(so far)
    for size in sizes:
        wider = np.zeros(len(ways) + 2 * size)
        wider[: len(ways)] += ways / 2
        wider[2 * size :] += ways / 2
        ways = wider
    # from the observed sum, itself included, upwards; index 0 is -sum(sizes)
    return min(1.0, float(ways[sum(sizes) + sum(steps) :].sum()))


def compare_anytime(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> PairedDifference:
    """Compare as `compare_paired` does, by p-values and an interval that hold at whatever number of tasks somebody
    chooses to stop. They need more evidence."""
    differences = np.subtract(np.asarray(first, dtype=float), np.asarray(second, dtype=float))
    error = (1 - confidence) / 2
    better, worse = anytime_p(differences), anytime_p(-differences)
    return replace(
        compare_paired(first, second, confidence),
        low=anytime_low(differences, error),
        high=-anytime_low(-differences, error),
        p_value=min(1.0, 2 * min(better, worse)),
        p_better=better,
    )


def anytime_p(differences: Sequence[float] | np.ndarray, least: float = 0.0) -> float:
    """Return how likely evidence for a mean above `least` ever becomes this strong where there is none; valid at
    whatever number of differences, each in [-1, 1], somebody chooses to stop.

    The inverse of the capital of gamblers who stake fixed shares of it on each difference being above `least`, all
    shares alike (Waudby-Smith and Ramdas, JRSS B 86, 2024, arXiv 2010.09686; Ville's inequality).
    """
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    # the worst difference is -1: a gambler who stakes everything loses everything
    gains = (values - least) / (1 + least)
    stakes = (np.arange(NUM_STAKES) + 0.5) / NUM_STAKES
    capital = np.log1p(np.outer(stakes, gains)) @ counts
    return min(1.0, math.exp(min(0.0, math.log(NUM_STAKES) - float(np.logaddexp.reduce(capital)))))


def anytime_low(differences: Sequence[float] | np.ndarray, error: float) -> float:
    """Return the lower end of a one-sided interval for the mean of differences, which holds at all their numbers at
    once: with probability `error` at most it is ever above the mean."""
    low, high = -1.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if anytime_p(differences, middle) <= error:
            low = middle
        else:
            high = middle
    return low


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Return (mean, low, high) of independent values, by Student's t."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()) if len(array) else 0.0, -math.inf, math.inf
    mean, deviation = float(array.mean()), float(array.std(ddof=1))
    spread = float(student.ppf((1 + confidence) / 2, len(array) - 1)) * deviation / math.sqrt(len(array))
    return mean, mean - spread, mean + spread


@dataclass(frozen=True)
class RateComparison:
    """Two rates, for example tokens per model call, and an interval for how they differ."""

    first: float
    second: float
    low: float
    high: float


Counts = Sequence[float]
"""One number per task."""


def compare_rates(
    first: tuple[Counts, Counts], second: tuple[Counts, Counts], confidence: float = CONFIDENCE, *, as_ratio: bool
) -> RateComparison:
    """Compare two rates, each given as (counts, units) per task, by their difference or their ratio.

    A rate is a sum over a sum, and the tasks are the same on both sides: the interval is the delta method's over tasks
    (Deng et al., KDD 2018, arXiv 1803.06336). Of rates that have no ratio the interval is unbounded.
    """
    (count, unit), (other_count, other_unit) = (
        (np.asarray(counts, dtype=float), np.asarray(units, dtype=float)) for counts, units in (first, second)
    )
    first_rate, second_rate = (
        float(c.sum() / u.sum()) if u.sum() else 0.0 for c, u in ((count, unit), (other_count, other_unit))
    )
    if len(count) < 2 or not unit.sum() or not other_unit.sum() or (as_ratio and not min(first_rate, second_rate)):
        return RateComparison(first_rate, second_rate, -math.inf, math.inf)
    # each task's influence on its rate; both sides are of the same tasks, so their difference, and not each alone, has
    # the variance that counts
    pulls = [
        (c - rate * u) / u.mean() / (rate if as_ratio else 1.0)
        for c, u, rate in ((count, unit, first_rate), (other_count, other_unit, second_rate))
    ]
    spread = float(norm.ppf((1 + confidence) / 2) * (pulls[0] - pulls[1]).std(ddof=1) / math.sqrt(len(count)))
    if not as_ratio:
        difference = first_rate - second_rate
        return RateComparison(first_rate, second_rate, difference - spread, difference + spread)
    # on the log scale: an interval of a ratio is not symmetric, and stays above 0
    middle = math.log(first_rate / second_rate)
    return RateComparison(first_rate, second_rate, math.exp(middle - spread), math.exp(middle + spread))


def bootstrap_mean(
    values: Sequence[float], seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Return (mean, low, high) by the percentile bootstrap; for differences of tokens."""
    if not values:
        return 0.0, 0.0, 0.0
    array = np.asarray(values, dtype=float)
    # fixed seed: a report that is written again has the same numbers
    picks = np.random.default_rng(seed).integers(0, len(array), size=(NUM_RESAMPLES, len(array)))
    means = array[picks].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(array.mean()), float(low), float(high)
