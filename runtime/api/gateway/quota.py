"""Token buckets that limit the requests and model tokens of one API key per minute.

Hazard: the model tokens of a request are known only after it, so that their bucket may be overdrawn; the next request
is rejected until the bucket has refilled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from runtime.api.errors import TooManyRequests

Clock = Callable[[], float]


class Bucket:
    """A token bucket: refills with `per_minute` units a minute and holds at most as many."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._refilled_at = clock()

    def spend(self, num: int) -> None:
        """Take `num` units; the level may become negative."""
        self._refill()
        self._level -= num

    def seconds_until(self, num: int) -> float:
        """Return the seconds until the level reaches `num`; 0 if it has."""
        self._refill()
        return max(0.0, (num - self._level) * 60.0 / self._per_minute)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._per_minute, self._level + (now - self._refilled_at) * self._per_minute / 60.0)
        self._refilled_at = now


class Quota:
    """The limits of one key; None means unlimited."""

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        # In memory alone: a restart fills the buckets, and each replica counts for itself.
        self._buckets = {kind: Bucket(limit, clock) for kind, limit in self._limits.items() if limit is not None}

    def admit(self) -> None:
        """Count a request. Raises TooManyRequests, in which case the request is not counted."""
        # Both buckets are checked before either is charged, so that a rejected request costs nothing.
        for kind in ("tokens", "requests"):
            if kind in self._buckets and (seconds := self._buckets[kind].seconds_until(1)) > 0:
                wait = max(1, math.ceil(seconds))
                raise TooManyRequests(
                    f"this key may use {self._limits[kind]} {kind} a minute: ask again in {wait} seconds",
                    limited=kind,
                    retry_after_seconds=wait,
                )
        if "requests" in self._buckets:
            self._buckets["requests"].spend(1)

    def refund_request(self) -> None:
        """Undo the count of a request that was rejected after `admit`."""
        if "requests" in self._buckets:
            self._buckets["requests"].spend(-1)

    def spend_tokens(self, num_tokens: int) -> None:
        """Count tokens that a request has used."""
        if "tokens" in self._buckets:
            self._buckets["tokens"].spend(num_tokens)
