"""Messages as Anthropic's API writes them: a turn as one message, or as the official sequence of events.

    message_start, ping
      content_block_start, content_block_delta ..., content_block_stop       for the text and for each tool call
    message_delta (the reason of the end, and the usage), message_stop       or error

Invariant: the events of one message add up to the message that the same turn has without a stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel

from memory.schema import dump_json
from runtime.agent.turn import Turn, TurnStart
from runtime.api.anthropic.messages_request import read_input
from runtime.api.errors import ApiError, anthropic_body
from runtime.api.openai.answer_ids import name_message
from runtime.api.openai.episode_summary import EpisodeSummary, summarize
from runtime.api.openai.models import pin
from runtime.engine.client import Delta

Json = dict[str, Any]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(BaseModel):
    """A text of the agent."""

    type: Literal["text"] = "text"
    text: str


class ToolUseBlock(BaseModel):
    """A call that the client is to run. Arguments that are no JSON object are `{"INVALID_JSON": "<their text>"}`."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: Json


class Usage(BaseModel):
    """Tokens of all model calls of this turn together; hits of the engine's prefix cache are not counted apart."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class Message(BaseModel):
    """The answer of a turn. Its `id` is the target of feedback."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage
    ratchet: EpisodeSummary | None
    """None in the first event of a stream."""


class TokenCount(BaseModel):
    """The tokens of a conversation as its request has it: what memory adds comes on top."""

    input_tokens: int


def complete(turn: Turn) -> Message:
    """Return the whole message at once."""
    content: list[TextBlock | ToolUseBlock] = []
    # An empty text rather than no block at all: clients read the first one.
    if turn.answer or not turn.open_tool_calls:
        content.append(TextBlock(text=turn.answer or ""))
    for call in turn.open_tool_calls:
        function = call["function"]
        content.append(ToolUseBlock(id=call["id"], name=function["name"], input=read_input(function["arguments"])))
    message = _begin(TurnStart(turn.trajectory, turn.first_position))
    reason, sequence = _end_of(turn)
    ended = {"content": content, "stop_reason": reason, "stop_sequence": sequence, "usage": _count(turn)}
    return message.model_copy(update={**ended, "ratchet": summarize(turn)})


def _begin(start: TurnStart) -> Message:
    return Message(
        id=name_message(start.trajectory.id, start.first_position),
        model=pin(start.trajectory.policy),
        content=[],
        stop_reason=None,
        stop_sequence=None,
        usage=Usage(input_tokens=0, output_tokens=0),
        ratchet=None,
    )


def _end_of(turn: Turn) -> tuple[StopReason, str | None]:
    # First: a call that was cut off must not be run, although its episode waits for the result.
    if turn.finish_reason == "length":
        return "max_tokens", None
    if turn.open_tool_calls:
        return "tool_use", None
    return ("stop_sequence", turn.stop_sequence) if turn.stop_sequence is not None else ("end_turn", None)


def _count(turn: Turn) -> Usage:
    return Usage(input_tokens=turn.size.prompt_tokens, output_tokens=turn.size.output_tokens)


class MessageWriter:
    """Writes one message as server-sent events."""

    def __init__(self, start: TurnStart) -> None:
        self._message = _begin(start)
        self._num_blocks = 0
        self._num_calls = 0
        self._open_kind = ""
        """Type of the block under way; empty between two blocks."""

    def begin(self) -> Iterator[str]:
        message = self._message.model_dump(mode="json", exclude={"ratchet"})
        # Without the count of the prompt, which the engine tells at the end: `message_delta` has the whole usage.
        yield _event("message_start", message=message)
        yield _event("ping")

    def write(self, delta: Delta) -> Iterator[str]:
        """Yield the events for a piece of the reply."""
        if delta.text:
            yield from self._write_text(delta.text)
        for piece in delta.calls:
            yield from self._write_call(piece)

    async def end(self, turn: Turn) -> AsyncIterator[str]:
        """Yield the last events: the end of the message, and its usage."""
        for event in self._end_blocks():
            yield event
        reason, sequence = _end_of(turn)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        summary = summarize(turn).model_dump(mode="json")
        yield _event("message_delta", delta=delta, usage=_count(turn).model_dump(), ratchet=summary)
        yield _event("message_stop")

    def fail(self, error: ApiError) -> Iterator[str]:
        body = anthropic_body(error)
        yield _event("error", **{name: value for name, value in body.items() if name != "type"})

    def _end_blocks(self) -> Iterator[str]:
        if not self._num_blocks:
            yield from self._write_text("")
        yield from self._end_block()

    def _write_text(self, text: str) -> Iterator[str]:
        if self._open_kind != "text":
            yield from self._begin_block({"type": "text", "text": ""})
        if text:
            yield self._delta({"type": "text_delta", "text": text})

    def _write_call(self, piece: Mapping[str, Any]) -> Iterator[str]:
        function = piece["function"]
        if piece["index"] >= self._num_calls:
            self._num_calls = piece["index"] + 1
            yield from self._begin_block({"type": "tool_use", "id": piece["id"], "name": function["name"], "input": {}})
        # Unparsed, unlike the input of a whole message: pieces that are sent cannot be taken back.
        if function.get("arguments"):
            yield self._delta({"type": "input_json_delta", "partial_json": function["arguments"]})

    def _begin_block(self, block: Json) -> Iterator[str]:
        yield from self._end_block()
        self._open_kind = block["type"]
        self._num_blocks += 1
        yield _event("content_block_start", index=self._num_blocks - 1, content_block=block)

    def _end_block(self) -> Iterator[str]:
        if self._open_kind:
            self._open_kind = ""
            yield _event("content_block_stop", index=self._num_blocks - 1)

    def _delta(self, delta: Json) -> str:
        return _event("content_block_delta", index=self._num_blocks - 1, delta=delta)


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {dump_json({'type': kind, **fields})}\n\n"
