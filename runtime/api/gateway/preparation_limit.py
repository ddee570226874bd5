"""Limits the concurrent requests that prepare tasks, for each key and each tenant.

Compiling games takes processor time from answering, and neither the request quota nor the token quota measures it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from runtime.api.errors import TooManyRequests
from runtime.api.gateway.permissions import Caller

MAX_PER_KEY = 2
MAX_PER_TENANT = 4
RETRY_AFTER_SECONDS = 5


class PreparationLimit:
    """Counts the requests under way of each key and tenant."""

    def __init__(self) -> None:
        self._num_under_way: Counter[tuple[str, str | None]] = Counter()

    @contextlib.contextmanager
    def admit(self, caller: Caller) -> Iterator[None]:
        """Count a request while it is under way. Raises: TooManyRequests."""
        limits = {("tenant", caller.tenant): MAX_PER_TENANT, ("key", caller.key_id): MAX_PER_KEY}
        for (kind, name), limit in limits.items():
            if self._num_under_way[kind, name] >= limit:
                raise TooManyRequests(
                    f"{limit} calls of this {kind} prepare tasks already: wait until one has ended",
                    limited="requests",
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
        # No `await` between the check and this, or two requests pass one free slot.
        self._num_under_way.update(limits.keys())
        try:
            yield
        finally:
            for counted in limits:
                self._num_under_way[counted] -= 1
                if not self._num_under_way[counted]:
                    del self._num_under_way[counted]
