"""Token buckets, on a fake clock."""

from __future__ import annotations

import pytest

from runtime.api.errors import TooManyRequests
from runtime.api.gateway.quota import Bucket, Quota


class Clock:
    """The fake at time's seam."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_bucket_fills_steadily_and_never_over_a_minutes_worth() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.spend(60)
    assert bucket.seconds_until(1) == pytest.approx(1.0)
    clock.seconds += 1
    assert bucket.seconds_until(1) == 0.0
    clock.seconds += 3600
    bucket.spend(60)
    assert bucket.seconds_until(1) == pytest.approx(1.0)


def test_a_refused_request_counts_as_none_and_says_when_to_come_back() -> None:
    clock = Clock()
    quota = Quota(requests_per_minute=2, clock=clock)
    quota.admit()
    quota.admit()
    for _ in range(5):
        with pytest.raises(TooManyRequests, match="2 requests a minute: ask again in 30 seconds") as refused:
            quota.admit()
    assert refused.value.headers == {"Retry-After": "30"}
    clock.seconds += 30
    quota.admit()


def test_overdrawn_tokens_are_waited_for_and_cost_no_request() -> None:
    clock = Clock()
    quota = Quota(requests_per_minute=1, tokens_per_minute=60, clock=clock)
    quota.spend_tokens(120)
    with pytest.raises(TooManyRequests) as refused:
        quota.admit()
    assert (refused.value.type, refused.value.headers) == ("tokens", {"Retry-After": "61"})
    clock.seconds += 61
    quota.admit()


def test_without_limits_nothing_is_counted() -> None:
    quota = Quota()
    for _ in range(1000):
        quota.admit()
        quota.spend_tokens(10**9)
