"""Chat completions in OpenAI's format: a turn as one answer, or as the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel

from memory.schema import dump_json
from runtime.agent.turn import Turn, TurnStart
from runtime.api.errors import ApiError, error_body
from runtime.api.openai.answer_ids import name_answer
from runtime.api.openai.episode_summary import EpisodeSummary, summarize
from runtime.api.openai.models import pin
from runtime.engine.client import Delta


class ToolFunction(BaseModel):
    """The name of a tool and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the client is to run."""

    id: str
    type: str = "function"
    function: ToolFunction


class Answer(BaseModel):
    """The agent's message."""

    role: str = "assistant"
    content: str | None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None


class Logprobs(BaseModel):
    """Log-probs of the tokens of the last model call, in order."""

    content: list[dict[str, Any]]
    refusal: None = None


class Choice(BaseModel):
    """The one choice there is."""

    index: int = 0
    message: Answer
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: Logprobs | None = None


class Usage(BaseModel):
    """Tokens of all model calls of this turn together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """The answer of a turn, made from `Turn` and read by the client. Its `id` is the target of feedback: the
    trajectory's, followed by the position of the turn's first step in all turns but the first."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    ratchet: EpisodeSummary


def complete(turn: Turn, *, with_logprobs: bool = False) -> ChatCompletion:
    """Return the whole answer at once."""
    calls = [ToolCall.model_validate(call) for call in turn.open_tool_calls]
    choice = Choice(
        message=Answer(content=turn.answer, tool_calls=calls or None),
        finish_reason=turn.finish_reason,
        logprobs=Logprobs(content=turn.logprobs) if with_logprobs else None,
    )
    return ChatCompletion(
        id=name_answer(turn.trajectory.id, turn.first_position),
        created=int(time.time()),
        model=pin(turn.trajectory.policy),
        choices=[choice],
        usage=_count(turn),
        ratchet=summarize(turn),
    )


class ChunkWriter:
    """Writes one answer as server-sent events."""

    def __init__(self, start: TurnStart, *, include_usage: bool) -> None:
        self._head = {
            "id": name_answer(start.trajectory.id, start.first_position),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": pin(start.trajectory.policy),
        }
        self._include_usage = include_usage

    def begin(self) -> Iterator[str]:
        yield self._chunk({"role": "assistant", "content": ""})

    def write(self, delta: Delta) -> Iterator[str]:
        """Yield the event for a piece of the reply."""
        change: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.calls:
            change["tool_calls"] = list(delta.calls)
        if change or delta.logprobs:
            yield self._chunk(change, logprobs={"content": list(delta.logprobs)} if delta.logprobs else None)

    async def end(self, turn: Turn) -> AsyncIterator[str]:
        """Yield the last events: the end of the answer, and its usage."""
        summary = summarize(turn).model_dump(mode="json")
        yield self._chunk({}, finish=turn.finish_reason, ratchet=summary)
        if self._include_usage:
            # An empty list, as OpenAI sends it: clients must not find a second choice here.
            yield _event({**self._head, "choices": [], "usage": _count(turn).model_dump()})
        yield DONE

    def fail(self, error: ApiError) -> Iterator[str]:
        yield _event(error_body(error))
        yield DONE

    def _chunk(
        self,
        delta: Mapping[str, Any],
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish: str | None = None,
        **extra: Any,
    ) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        # OpenAI sends a null usage in all other chunks, and some clients read the field from each.
        usage = {"usage": None} if self._include_usage else {}
        return _event({**self._head, "choices": [choice], **usage, **extra})


def _count(turn: Turn) -> Usage:
    prompt, output = turn.size.prompt_tokens, turn.size.output_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=output, total_tokens=prompt + output)


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {dump_json(body)}\n\n"


DONE = "data: [DONE]\n\n"
