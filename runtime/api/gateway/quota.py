"""How much a key may ask in a minute: requests, counted as they come, and tokens, counted when they are known.

Refuses to know whose quota it is. Two buckets that fill steadily and hold a minute's worth. Tokens are known only after
the fact, so their bucket may be overdrawn: the next request waits until it is filled again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from runtime.api.errors import TooManyRequests

Clock = Callable[[], float]


class Bucket:
    """`per_minute` drops a minute, at most as many at once."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._seen_at = clock()

    def spend(self, num: int) -> None:
        """Take `num` drops, more than there are if need be."""
        self._fill()
        self._level -= num

    def seconds_until(self, num: int) -> float:
        """Return how long it takes until `num` drops are there; 0 when they are."""
        self._fill()
        return max(0.0, (num - self._level) * 60.0 / self._per_minute)

    def _fill(self) -> None:
        moment = self._clock()
        self._level = min(self._per_minute, self._level + (moment - self._seen_at) * self._per_minute / 60.0)
        self._seen_at = moment


class Quota:
    """What one key may ask. Without limits, everything."""

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._buckets = {kind: Bucket(limit, clock) for kind, limit in self._limits.items() if limit is not None}

    def admit(self) -> None:
        """Count a request. Raises TooManyRequests, which counts as none."""
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

    def give_back(self) -> None:
        """Count a request as none after all."""
        if "requests" in self._buckets:
            self._buckets["requests"].spend(-1)

    def spend_tokens(self, num_tokens: int) -> None:
        """Count tokens that were used."""
        if "tokens" in self._buckets:
            self._buckets["tokens"].spend(num_tokens)
