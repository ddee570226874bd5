"""How many calls that prepare tasks may be under way: a few for a key, a few more for a tenant.

Preparing costs processor time that answering needs, and nothing of it is counted as requests or tokens.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from runtime.api.errors import TooManyRequests
from runtime.api.gateway.permissions import Caller

MAX_OF_A_KEY = 2
MAX_OF_A_TENANT = 4
RETRY_AFTER_SECONDS = 5


class PreparationLimit:
    """Counts the calls under way of each key and tenant."""

    def __init__(self) -> None:
        self._under_way: Counter[tuple[str, str | None]] = Counter()

    @contextlib.contextmanager
    def admit(self, caller: Caller) -> Iterator[None]:
        """Count a call while it is under way. Raises: TooManyRequests."""
        whose = {("tenant", caller.tenant): MAX_OF_A_TENANT, ("key", caller.key_id): MAX_OF_A_KEY}
        for (kind, name), most in whose.items():
            if self._under_way[kind, name] >= most:
                raise TooManyRequests(
                    f"{most} calls of this {kind} prepare tasks already: wait until one has ended",
                    limited="requests",
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
        self._under_way.update(whose.keys())
        try:
            yield
        finally:
            for one in whose:
                self._under_way[one] -= 1
                if not self._under_way[one]:
                    del self._under_way[one]
