from __future__ import annotations

import numpy as np
import pytest

from memory.statistics import wilson_interval
from optimizer.evaluation.intervals import bootstrap_mean, compare_paired


def test_wilson_agrees_with_published_values():
    low, high = wilson_interval(24, 200)

    assert (round(low, 3), round(high, 3)) == (0.082, 0.172)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_equal_outcomes_still_leave_room_for_a_difference():
    outcomes = [True] * 20 + [False] * 180

    paired = compare_paired(outcomes, outcomes)

    assert paired.difference == 0 and paired.low < 0 < paired.high
    assert paired.p_value == 1.0


def test_a_one_sided_change_is_seen_by_interval_and_test():
    first = [True] * 90 + [False] * 110
    second = [True] * 50 + [False] * 150

    paired = compare_paired(first, second)

    assert (paired.num_won, paired.num_lost) == (40, 0)
    assert paired.low > 0 and paired.p_value < 1e-9


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_the_interval_covers_the_truth_as_often_as_it_says(gain):
    dice = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        second = dice.random(200) < 0.3
        first = np.where(dice.random(200) < 0.6, second, dice.random(200) < 0.3 + gain / 0.4)
        paired = compare_paired(first.tolist(), second.tolist())
        covered += paired.low <= gain <= paired.high
    assert 0.92 <= covered / 400 <= 1.0


def test_the_mean_of_differences_comes_with_an_interval():
    mean, low, high = bootstrap_mean([10.0, 12.0, 8.0, 11.0] * 20)

    assert low < mean < high and abs(mean - 10.25) < 1e-9
    assert bootstrap_mean([]) == (0.0, 0.0, 0.0)
