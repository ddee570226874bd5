"""How many turns are under way at once: as many as the engine can hold, and not one more.

Refuses to know who asks and for what. Whom there is no room for is told so before anything of the request is read, so
that it costs next to nothing and leaves no trajectory; who was let in is answered in good time.
Invariant: a place is given back when its answer has been sent, or nobody waits for it any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from runtime.api.errors import Overloaded

TURNS = frozenset({("POST", "/v1/chat/completions"), ("POST", "/v1/responses")})
"""The routes whose requests keep the engine at work."""


class Room:
    """Places for `max_turns`."""

    def __init__(self, max_turns: int) -> None:
        self._max_turns = max_turns
        self._num_turns = 0

    def require(self) -> None:
        """Raise Overloaded unless there is a place left."""
        if self._num_turns >= self._max_turns:
            raise Overloaded(
                f"the engine is at work on {self._num_turns} requests, as many as it takes: ask again in a moment"
            )

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Hold a place that was found free; no await may have come between."""
        self._num_turns += 1
        try:
            yield
        finally:
            self._num_turns -= 1
