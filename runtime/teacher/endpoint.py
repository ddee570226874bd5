"""Calls to a teacher: any endpoint with OpenAI's chat completions.

Invariants: no call is sent whose worst case exceeds the budget. The key stands in one header, and is cut out of every
message. Redirects are not followed, since they would carry the key elsewhere.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx

from memory.conversation import as_reply
from memory.schema import clean
from runtime.config import TeacherConfig
from runtime.engine.client import Message, ToolCall, ToolDefinition
from runtime.teacher.budget import TeacherBudget, Usage

MAX_TRIES = 5
MAX_PAUSE_SECONDS = 60.0
"""A longer `Retry-After` is not waited for."""
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
MAX_ERROR_CHARS = 300
PASSING_STATUSES = frozenset({429, 500, 502, 503, 504, 529})

Sleep = Callable[[float], Awaitable[object]]


class TeacherError(Exception):
    """The teacher cannot be used; the message names the error and the mend. `status` is None without an answer."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class TeacherReply:
    """One reply of the teacher."""

    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    is_cut: bool = False
    """Whether it ended at its limit of tokens."""

    def as_message(self) -> Message:
        return as_reply(self.content, self.tool_calls)


class Teacher:
    """The model at an endpoint; usable as an async context manager."""

    def __init__(
        self,
        config: TeacherConfig,
        budget: TeacherBudget,
        *,
        api_key: str | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        assert config.url is not None and config.model is not None
        self.model = config.model
        self.url = config.url.rstrip("/")
        self._key_name = config.api_key
        self._api_key = api_key
        self._budget = budget
        self._sleep = sleep
        # OpenAI's reasoning models refuse `max_tokens`; many other endpoints know no other name.
        self._limit_name = "max_tokens"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
        self._http = httpx.AsyncClient(timeout=TIMEOUT, headers=headers, follow_redirects=False)

    async def __aenter__(self) -> Teacher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def complete(
        self, messages: Sequence[Message], tools: Sequence[ToolDefinition], *, max_tokens: int
    ) -> TeacherReply:
        """Return the reply to `messages`, of at most `max_tokens` tokens. Short failures are waited for.

        Raises:
            BudgetSpent: its worst case does not fit into the budget; nothing was sent.
            TeacherError: the endpoint refuses the call, or does not answer.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        if tools:  # an empty list is refused
            body["tools"] = list(tools)
        pause = 1.0
        for number in range(1, MAX_TRIES + 1):
            try:
                return await self._try(body, max_tokens)
            except _Passing as passing:
                wait = pause if passing.retry_after is None else passing.retry_after
                if number == MAX_TRIES or wait > MAX_PAUSE_SECONDS:
                    raise passing.error from None
            await self._sleep(wait)
            pause *= 2
        raise AssertionError("the last try returns or raises")

    async def _try(self, body: dict[str, Any], max_tokens: int) -> TeacherReply:
        reservation = self._budget.reserve(bound_prompt_tokens(body), max_tokens)
        try:
            response = await self._http.post(
                f"{self.url}/chat/completions", json={**body, self._limit_name: max_tokens}
            )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._budget.release(reservation)
            raise _Passing(self._unreachable(error)) from None
        except httpx.TransportError as error:
            self._budget.charge(reservation, None)  # it was sent, so it may have been answered and charged
            raise _Passing(self._unreachable(error)) from None
        except BaseException:
            self._budget.charge(reservation, None)  # as above, for a cancelled call
            raise
        if response.is_success:
            answer = _parse(response)
            self._budget.charge(reservation, _usage_of(answer))
            return self._read(answer)
        self._budget.release(reservation)
        message = self._message_of(response)
        if response.status_code == 400 and "max_completion_tokens" in message and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
            return await self._try(body, max_tokens)
        error = TeacherError(self._explain(response.status_code, message), status=response.status_code)
        if response.status_code in PASSING_STATUSES:
            raise _Passing(error, _retry_after(response))
        raise error

    def _unreachable(self, error: httpx.TransportError) -> TeacherError:
        reason = self._redact(f"{type(error).__name__} {error}".strip())
        return TeacherError(f"the teacher at {self.url} does not answer ({reason}): check teacher.url and the network")

    def _message_of(self, response: httpx.Response) -> str:
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = response.text
        return self._redact(message)[:MAX_ERROR_CHARS]

    def _redact(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text

    def _explain(self, status: int, message: str) -> str:
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown status"
        head = f"the teacher {self.model!r} at {self.url} answered {status} {phrase}"
        if status in (401, 403):
            mend = (
                f"the key is refused: give the environment variable {self._key_name} a valid one"
                if self._key_name
                else "set teacher.api_key to the name of the environment variable that holds its key"
            )
            return f"{head}: {mend}"  # without the message, which may quote a part of the key
        if status == 429:
            mend = "its rate limit or quota is used up: run the command again later, or with a lower --concurrency"
        elif status >= 500:
            mend = "it failed: run the command again later"
        elif status == 404:
            mend = "check teacher.model, and teacher.url, which ends before /chat/completions"
        elif 300 <= status < 400:
            mend = "redirects are not followed: give its final address as teacher.url"
        else:
            mend = "it refuses the request"
        return f"{head} ({message or 'no reason given'}): {mend}"

    def _read(self, answer: dict[str, Any]) -> TeacherReply:
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            calls = [_read_call(call) for call in message.get("tool_calls") or []]
            return TeacherReply(clean(message.get("content") or ""), calls, choice.get("finish_reason") == "length")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise TeacherError(f"the answer of {self.url} is no chat completion: check teacher.url") from None


class _Passing(Exception):
    """A failure that may pass; `retry_after` is what the endpoint asks to wait, in seconds."""

    def __init__(self, error: TeacherError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after


def bound_prompt_tokens(body: dict[str, Any]) -> int:
    """Return an upper bound of the tokens of a request's prompt: its bytes as JSON.

    A byte-level tokenizer makes at most one token of a byte, and JSON's own marks outweigh those of a chat template.
    For most text the bound is three to four times too high, because the endpoint's tokenizer is unknown.
    """
    return len(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))


def _parse(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _usage_of(answer: dict[str, Any]) -> Usage | None:
    try:
        usage = answer["usage"]
        return Usage(int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
    except (KeyError, TypeError, ValueError):
        return None


def _read_call(call: dict[str, Any]) -> ToolCall:
    function = call["function"]
    named = {"name": str(function["name"]), "arguments": str(function.get("arguments") or "{}")}
    return {"id": str(call["id"]), "type": "function", "function": named}


def _retry_after(response: httpx.Response) -> float | None:
    """Return the header's seconds; None without it, or for a date."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
