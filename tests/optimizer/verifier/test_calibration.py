"""AUC, Platt scaling and the threshold, against cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.verifier.calibration import auc_interval, fit, measure_auc, measure_brier, share_interval


@pytest.mark.parametrize(
    ("scores", "labels", "auc"),
    [
        ([1, 2, 3, 4], [False, False, True, True], 1.0),
        ([1, 2, 3, 4], [True, True, False, False], 0.0),
        ([1, 1, 1, 1], [True, False, True, False], 0.5),
        ([1, 3, 2, 4], [False, False, True, True], 0.75),
        ([5, 5, 1], [True, False, False], 0.75),
    ],
)
def test_the_auc_is_the_share_of_pairs_in_the_right_order(scores, labels, auc):
    assert measure_auc(scores, labels) == pytest.approx(auc)


def test_calibration_recovers_the_probabilities_that_labels_were_drawn_from():
    random = np.random.default_rng(0)
    margins = random.normal(0, 3, 4_000)
    true = 1 / (1 + np.exp(-(0.5 * margins + 1)))
    labels = random.random(4_000) < true

    calibration = fit(margins.tolist(), labels.tolist())

    assert (calibration.slope, calibration.offset) == (pytest.approx(0.5, abs=0.05), pytest.approx(1, abs=0.1))
    assert np.abs(calibration.probabilities(margins.tolist()) - true).max() < 0.05
    raw = 1 / (1 + np.exp(-margins))
    assert measure_brier(calibration.probabilities(margins.tolist()), labels.tolist()) < measure_brier(
        raw, labels.tolist()
    )


def test_the_threshold_separates_rare_failures_as_well():
    margins, labels = [5.0] * 20 + [3.0, 3.1], [True] * 20 + [False, False]
    calibration = fit(margins, labels)
    assert calibration.decide([3.0, 3.1, 5.0]).tolist() == [False, False, True]
    assert 0 < calibration.slope < float("inf")


def test_a_verifier_that_is_wrong_more_often_than_right_is_not_turned_round():
    calibration = fit([3.0, 2.0, -2.0, -3.0] * 5, [False, False, True, True] * 5)
    assert calibration.slope == pytest.approx(0.0, abs=1e-6)
    assert calibration.probabilities([9.0]).tolist() == pytest.approx([0.5], abs=1e-3)


def test_an_interval_over_tasks_is_wider_than_one_over_their_repeated_episodes():
    random = np.random.default_rng(1)
    labels = ([True] * 10 + [False] * 10) * 5
    scores = list(random.normal(0, 1, 20) + np.asarray(labels[:20], dtype=float)) * 5
    over_tasks = auc_interval(scores, labels, list(range(20)) * 5)
    over_episodes = auc_interval(scores, labels, list(range(100)))
    assert over_tasks[0] <= measure_auc(scores, labels) <= over_tasks[1]
    assert over_tasks[1] - over_tasks[0] > over_episodes[1] - over_episodes[0]


def test_an_agreement_on_repeated_episodes_of_few_tasks_is_less_certain():
    is_right = [True, True, True, False] * 10
    tasks = list(range(4)) * 10
    over_tasks, over_episodes = share_interval(is_right, tasks), share_interval(is_right, list(range(40)))
    assert over_tasks[0] < over_episodes[0] < 0.75 < over_episodes[1] < over_tasks[1]


def test_an_agreement_without_an_error_is_not_certain():
    low, high = share_interval([True] * 12, [0, 1, 2] * 4)
    assert 0.7 < low < 0.8 and high == 1.0
