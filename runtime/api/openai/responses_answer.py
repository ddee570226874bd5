"""Responses as OpenAI writes them: a turn as one object, or as the official sequence of events.

    response.created, response.in_progress
      response.output_item.added
        response.content_part.added, response.output_text.delta ..., response.output_text.done, content_part.done
        response.function_call_arguments.delta ..., response.function_call_arguments.done
      response.output_item.done
    response.completed | response.incomplete | response.failed

Invariant: the events of one response add up to the object that is stored of it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

from memory.schema import dump_json, new_id
from runtime.agent.turn import Turn, TurnStart
from runtime.api.errors import ApiError
from runtime.api.openai.answer_ids import name_response
from runtime.api.openai.episode_summary import summarize
from runtime.api.openai.models import pin
from runtime.api.openai.responses_request import ResponseRequest
from runtime.engine.client import Delta

Json = dict[str, Any]


def begin_response(request: ResponseRequest, start: TurnStart, instructions: str | None) -> Json:
    """Return the object of a response that has just begun."""
    trajectory = start.trajectory
    return {
        "id": name_response(trajectory.id, start.first_position),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": pin(trajectory.policy),
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
        "store": request.store is not False,
        "temperature": request.temperature if request.temperature is not None else trajectory.temperature,
        "text": {"format": (request.text and request.text.format) or {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": [{"strict": None, "description": None, "parameters": None, **tool} for tool in request.tools or ()],
        "top_p": request.top_p if request.top_p is not None else 1.0,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


def end_response(response: Json, turn: Turn, output: list[Json], context_tokens: int | None) -> Json:
    """Return the object of a response that is over, with these items. `context_tokens`: length of the model's context;
    None: unknown."""
    is_cut = turn.finish_reason == "length"
    ended: Json = {"status": "incomplete" if is_cut else "completed", "output": output, "usage": _count(turn)}
    limit, capacity = response["max_output_tokens"], turn.output_capacity(context_tokens)
    if limit is not None and capacity is not None:
        ended["max_output_tokens"] = min(limit, capacity)  # the engine never writes beyond its context
    if is_cut:
        ended["incomplete_details"] = {"reason": "max_output_tokens"}
    else:
        ended["completed_at"] = int(time.time())
    return {**response, **ended, "ratchet": summarize(turn).model_dump(mode="json")}


def fail_response(response: Json, error: ApiError) -> Json:
    """Return the object of a response that failed."""
    # OpenAI's codes are a closed list, which typed clients check; ours is not among them.
    return {**response, "status": "failed", "error": {"code": "server_error", "message": str(error)}}


def list_output(turn: Turn) -> list[Json]:
    """Return the text and the open calls of a turn, as items."""
    output = [_message_item(turn.answer)] if turn.answer or not turn.open_tool_calls else []
    for call in turn.open_tool_calls:
        item = _call_item(call["id"], call["function"]["name"])
        output.append({**item, "status": "completed", "arguments": call["function"]["arguments"]})
    return output


def _message_item(text: str | None) -> Json:
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [_part(text)],
    }


def _part(text: str | None) -> Json:
    return {"type": "output_text", "text": text or "", "annotations": [], "logprobs": []}


def _call_item(call_id: str, name: str) -> Json:
    item = {"id": new_id("fc"), "type": "function_call", "status": "in_progress"}
    return {**item, "call_id": call_id, "name": name, "arguments": ""}


def _count(turn: Turn) -> Json:
    size = turn.size
    return {
        "input_tokens": size.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},  # the engine's hits are not counted
        "output_tokens": size.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": size.prompt_tokens + size.output_tokens,
    }


class ResponseWriter:
    """Writes one response as server-sent events, and collects its items."""

    def __init__(self, response: Json, store: Callable[[Json], Awaitable[None]], context_tokens: int | None) -> None:
        """`store` is awaited with the whole response before its last event. `context_tokens` as in `end_response`."""
        self.response = response
        self.output: list[Json] = []
        self._store = store
        self._context_tokens = context_tokens
        self._num_events = 0
        self._num_calls = 0

    def begin(self) -> Iterator[str]:
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def write(self, delta: Delta) -> Iterator[str]:
        """Yield the events for a piece of the reply."""
        if delta.text:
            yield from self._write_text(delta.text)
        for piece in delta.calls:
            yield from self._write_call(piece)

    async def end(self, turn: Turn) -> AsyncIterator[str]:
        """Yield the last events: the end of the last item, and the response as it is stored."""
        for event in self._end_items():
            yield event
        response = end_response(self.response, turn, self.output, self._context_tokens)
        await self._store(response)
        yield self._event(f"response.{response['status']}", response=response)

    def fail(self, error: ApiError) -> Iterator[str]:
        response = fail_response(self.response, error)
        yield self._event(f"response.{response['status']}", response=response)

    def _end_items(self) -> Iterator[str]:
        if not self.output:
            yield from self._write_text("")
        yield from self._end_item()

    def _write_text(self, text: str) -> Iterator[str]:
        if not self._is_open("message"):
            item = _message_item("") | {"status": "in_progress", "content": []}
            yield from self._begin_item(item)
            # After the item's event, which is a text by now: OpenAI announces the item without its part.
            item["content"] = [_part("")]
            yield self._in_part("response.content_part.added", part=_part(""))
        if text:
            self.output[-1]["content"][0]["text"] += text
            yield self._in_part("response.output_text.delta", delta=text, logprobs=[])

    def _write_call(self, piece: Mapping[str, Any]) -> Iterator[str]:
        function = piece["function"]
        if piece["index"] >= self._num_calls:
            self._num_calls = piece["index"] + 1
            yield from self._begin_item(_call_item(piece["id"], function["name"]))
        if function.get("arguments"):
            self.output[-1]["arguments"] += function["arguments"]
            yield self._in_item("response.function_call_arguments.delta", delta=function["arguments"])

    def _begin_item(self, item: Json) -> Iterator[str]:
        yield from self._end_item()
        self.output.append(item)
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=item)

    def _end_item(self) -> Iterator[str]:
        if not self.output or self.output[-1]["status"] != "in_progress":
            return
        item = self.output[-1]
        if item["type"] == "message":
            part = item["content"][0]
            yield self._in_part("response.output_text.done", text=part["text"], logprobs=[])
            yield self._in_part("response.content_part.done", part=part)
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._in_item("response.function_call_arguments.done", **done)
        item["status"] = "completed"
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _is_open(self, kind: str) -> bool:
        last = self.output[-1] if self.output else {}
        return last.get("type") == kind and last.get("status") == "in_progress"

    def _in_item(self, kind: str, **fields: Any) -> str:
        return self._event(kind, item_id=self.output[-1]["id"], output_index=len(self.output) - 1, **fields)

    def _in_part(self, kind: str, **fields: Any) -> str:
        return self._in_item(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        # Becomes text at once: the items in it are changed afterwards.
        body = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: {dump_json(body)}\n\n"
