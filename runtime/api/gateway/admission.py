"""How many turns are under way at once: as many as the engine can hold, shared among the tenants that ask.

A request over capacity is turned away before its body is read, so that it costs next to nothing and leaves no
trajectory; its place is taken only once its body is here.
Invariants: a place is given back when its answer has been sent, or nobody waits for it any more; a tenant that asks
alone may have every place, and one that asks beside others gets its share as places become free.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator

from runtime.api.errors import Overloaded

TURNS = frozenset({("POST", "/v1/chat/completions"), ("POST", "/v1/responses")})
"""The routes whose requests keep the engine at work."""
ASKS_SECONDS = 10.0
"""A tenant that asked within this time is waiting for its share, though it may have been turned away."""
SEEN_SECONDS = 3600.0
RESERVED = 8
"""One place in so many is kept free for a tenant that has less than its share, where there are several tenants."""
MAX_TENANTS_REMEMBERED = 10_000


class ConcurrencyLimit:
    """Places for `max_turns`."""

    def __init__(self, max_turns: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_turns = max_turns
        self._clock = clock
        self._held: Counter[str] = Counter()
        self._asked_at: dict[str, float] = {}
        """When each tenant asked last; the tenant that asked longest ago comes first."""

    def require(self, tenant: str) -> None:
        """Raise Overloaded unless there is a place left for this tenant."""
        moment = self._clock()
        self._remember(tenant, moment)
        num_turns, num_own = self._held.total(), self._held[tenant]
        recently = itertools.takewhile(lambda it: moment - self._asked_at[it] <= ASKS_SECONDS, reversed(self._asked_at))
        asking = set(self._held).union(recently)
        has_share = num_own < math.ceil(self._max_turns / len(asking))
        num_reserved = self._max_turns // RESERVED if len(self._asked_at) > 1 else 0
        if num_turns >= self._max_turns:
            raise Overloaded(
                f"the engine is at work on {num_turns} requests, as many as it takes: ask again in a moment"
            )
        if not has_share and num_turns >= self._max_turns - num_reserved:
            raise Overloaded(
                f"the engine is at work on {num_own} requests of this tenant, its share while others ask: ask again in "
                "a moment"
            )

    @contextlib.contextmanager
    def take(self, tenant: str) -> Iterator[None]:
        """Hold a place that was found free; no await may have come between."""
        self._held[tenant] += 1
        try:
            yield
        finally:
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]

    def _remember(self, tenant: str, moment: float) -> None:
        self._asked_at.pop(tenant, None)
        self._asked_at[tenant] = moment
        oldest = next(iter(self._asked_at))
        if moment - self._asked_at[oldest] > SEEN_SECONDS or len(self._asked_at) > MAX_TENANTS_REMEMBERED:
            del self._asked_at[oldest]
