"""Limits the turns under way to the number that the engine can hold, shared among the active tenants.

Requests over capacity are rejected before their body is read, so that they cost next to nothing and leave no
trajectory. A slot is occupied only after the body has arrived.
Invariants: a slot is released when the answer has been sent or its client has left. A tenant that is active alone may
occupy every slot; a tenant among others gets its share as slots become free.
Hazard: `require` and `occupy` must run without an await between them, or two requests take the same slot.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator

from runtime.api.errors import Overloaded

TURNS = frozenset(
    {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
    }
)
"""The routes whose requests occupy the engine."""
ACTIVE_SECONDS = 10.0
"""A tenant whose last request is no older than this counts as active, even if that request was rejected."""
REMEMBERED_SECONDS = 3600.0
RESERVED_FRACTION = 8
"""With several tenants, one slot in eight stays free for tenants below their share."""
MAX_TENANTS_REMEMBERED = 10_000


class ConcurrencyLimit:
    """Slots for `max_turns` turns, counted for each tenant; `holder` is what holds them, for messages."""

    def __init__(
        self, max_turns: int, clock: Callable[[], float] = time.monotonic, *, holder: str = "the engine"
    ) -> None:
        self._max_turns = max_turns
        self._holder = holder
        self._clock = clock
        self._num_occupied: Counter[str] = Counter()
        self._last_request_at: dict[str, float] = {}
        """Clock time of each tenant's last request, oldest first: `_remember` keeps this order by reinsertion."""

    def require(self, tenant: str) -> None:
        """Raise Overloaded unless there is a free slot for this tenant."""
        now = self._clock()
        self._remember(tenant, now)
        num_turns, num_own = self._num_occupied.total(), self._num_occupied[tenant]
        recent = itertools.takewhile(
            lambda it: now - self._last_request_at[it] <= ACTIVE_SECONDS, reversed(self._last_request_at)
        )
        # Tenants with slots are active too, however long ago they occupied them.
        active = set(self._num_occupied).union(recent)
        # Never divided by zero: `_remember` has just made this tenant active.
        has_share = num_own < math.ceil(self._max_turns / len(active))
        num_reserved = self._max_turns // RESERVED_FRACTION if len(self._last_request_at) > 1 else 0
        if num_turns >= self._max_turns:
            raise self._overloaded(f"{num_turns} requests, its maximum")
        if not has_share and num_turns >= self._max_turns - num_reserved:
            raise self._overloaded(f"{num_own} requests of this tenant, its share while others ask")

    @contextlib.contextmanager
    def occupy(self, tenant: str) -> Iterator[None]:
        """Occupy a slot that `require` has just found free."""
        self._num_occupied[tenant] += 1
        try:
            yield
        finally:
            self._num_occupied[tenant] -= 1
            # A tenant left at zero would still count as active in `require`.
            if not self._num_occupied[tenant]:
                del self._num_occupied[tenant]

    def _overloaded(self, reason: str) -> Overloaded:
        code = f"{self._holder.removeprefix('the ')}_overloaded"
        return Overloaded(f"{self._holder} is at work on {reason}: ask again in a moment", code=code)

    def _remember(self, tenant: str, now: float) -> None:
        self._last_request_at.pop(tenant, None)
        self._last_request_at[tenant] = now
        # One entry a request is enough: the dictionary grows by at most one.
        oldest = next(iter(self._last_request_at))
        is_stale = now - self._last_request_at[oldest] > REMEMBERED_SECONDS
        if is_stale or len(self._last_request_at) > MAX_TENANTS_REMEMBERED:
            del self._last_request_at[oldest]
