"""The part of a streamed reply that its client sees: all text, and the calls of tools that the client runs.

Invariant: pieces of calls to the server's own tools are never sent, and the client's calls are numbered without gaps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from runtime.engine.client import Delta, OnDelta, ToolCall


class ClientStream:
    """Filters the deltas of one reply on their way from the engine to the client."""

    def __init__(self, on_delta: OnDelta, client_tools: Collection[str]) -> None:
        self._on_delta = on_delta
        self._client_tools = client_tools
        self._client_index: dict[int, int] = {}
        """The engine's index of a call -> the index that the client sees."""
        self._beginnings: dict[int, ToolCall] = {}
        """Joined pieces of calls whose name is incomplete or is not a client tool's."""
        self.has_sent = False
        """Whether the client received any of it: a reply that was partly sent cannot be asked for again."""

    async def __call__(self, delta: Delta) -> None:
        """Pass on the visible part of a delta, if there is one."""
        visible = replace(delta, calls=[piece for call in delta.calls if (piece := self._visible_piece(call))])
        if visible:
            self.has_sent = True
            await self._on_delta(visible)

    def _visible_piece(self, piece: ToolCall) -> ToolCall | None:
        index = piece["index"]
        if index not in self._client_index:
            piece = self._beginnings[index] = _join(self._beginnings.get(index), piece)
            # A name may arrive in pieces, so what was held back is sent with the piece that completes it.
            if piece["function"]["name"] not in self._client_tools:
                return None
            # From 0 without gaps: clients use the index as a position in their list of calls.
            self._client_index[index] = len(self._client_index)
            return piece | {"index": self._client_index[index]}
        # Later pieces must not repeat the name, not even empty: clients add up the pieces of each field.
        return {"index": self._client_index[index], "function": {"arguments": piece["function"]["arguments"]}}


class BufferedStream:
    """Keeps the deltas of one reply back until it is known that its client may see them."""

    def __init__(self, stream: ClientStream) -> None:
        self._stream = stream
        self._deltas: list[Delta] = []

    @property
    def has_sent(self) -> bool:
        return self._stream.has_sent

    async def __call__(self, delta: Delta) -> None:
        """Keep a delta."""
        self._deltas.append(delta)

    async def release(self) -> None:
        """Pass on what was held back, once."""
        deltas, self._deltas = self._deltas, []
        for delta in deltas:
            await self._stream(delta)


def _join(beginning: ToolCall | None, piece: ToolCall) -> ToolCall:
    if beginning is None:
        return piece
    function = {key: beginning["function"][key] + piece["function"][key] for key in ("name", "arguments")}
    return beginning | {"function": function}
