from __future__ import annotations

import pytest

from memory.statistics import wilson_interval


def test_the_score_interval_agrees_with_published_values() -> None:
    assert wilson_interval(24, 200) == pytest.approx((0.0820, 0.1723), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_nothing_is_known_of_a_share_without_tries() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
