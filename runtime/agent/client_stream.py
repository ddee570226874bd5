"""What a client hears of a reply while it is written: all text, and of the tool calls those it is to run.

Refuses to know where the pieces come from and where they go. Invariant: the calls of the server's own tools are nobody
else's business, and the client's are numbered as if there were no others.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from runtime.engine.client import Delta, OnDelta


class ClientStream:
    """Stands between the engine and who listens, for one reply."""

    def __init__(self, on_delta: OnDelta, client_tools: Collection[str]) -> None:
        self._on_delta = on_delta
        self._client_tools = client_tools
        self._numbers: dict[int, int] = {}
        """The engine's number of a call -> the client's."""
        self._held: dict[int, dict[str, Any]] = {}
        """The beginnings of calls whose name is not complete, or not a client's tool."""
        self.has_heard = False
        """Whether any of it was said: what was said cannot be taken back."""

    async def __call__(self, delta: Delta) -> None:
        heard = replace(delta, calls=[piece for call in delta.calls if (piece := self._let_through(call))])
        if heard:
            self.has_heard = True
            await self._on_delta(heard)

    def _let_through(self, piece: dict[str, Any]) -> dict[str, Any] | None:
        index = piece["index"]
        if index not in self._numbers:
            piece = self._held[index] = _join(self._held.get(index), piece)
            if piece["function"]["name"] not in self._client_tools:
                return None
            self._numbers[index] = len(self._numbers)
            return piece | {"index": self._numbers[index]}
        # A name is given once: an empty one in later pieces would only puzzle who adds them up.
        return {"index": self._numbers[index], "function": {"arguments": piece["function"]["arguments"]}}


def _join(held: dict[str, Any] | None, piece: dict[str, Any]) -> dict[str, Any]:
    if held is None:
        return piece
    function = {key: held["function"][key] + piece["function"][key] for key in ("name", "arguments")}
    return held | {"function": function}
