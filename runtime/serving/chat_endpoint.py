"""Calls to a model elsewhere: any endpoint with OpenAI's chat completions. The teacher and the critic may be one.

Invariants: no call is sent whose worst case exceeds the budget. The key stands in one header, and is cut out of every
message. Redirects are not followed, since they would carry the key elsewhere. Chat marks in what is sent are broken.
Hazard: an endpoint's own words can quote a prompt. `str` of an error holds them and the address, its `reason` neither.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

import httpx

from memory.chat_marks import ANY_FAMILY, run_in_slices
from memory.conversation import as_reply
from memory.schema import clean
from runtime.config import EndpointConfig
from runtime.engine.client import Message, ToolCall, ToolDefinition

MAX_TRIES = 5
MAX_PAUSE_SECONDS = 60.0
"""A longer `Retry-After` is not waited for."""
TRY_SECONDS = 600.0
"""Maximum duration of one try."""
CONNECT_SECONDS = 10.0
MAX_ERROR_CHARS = 300
PASSING_STATUSES = frozenset({429, 500, 502, 503, 504, 529})
FULL_CONTEXT = ("context_length_exceeded", "maximum context length")
"""Words in the refusal of a prompt that is too long: OpenAI's code, and vLLM's message."""

Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True)
class Usage:
    """Tokens of one call."""

    prompt_tokens: int
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


class CallBudget(Protocol):
    """The bound on the calls to an endpoint."""

    def reserve(self, prompt_tokens: int, output_tokens: int) -> Usage:
        """Reserve the worst case of a call; every reservation is released, or charged, once.

        Raises: what says that it does not fit; then nothing is sent.
        """
        ...

    def release(self, reservation: Usage) -> None:
        """Take back the reservation of a call that the endpoint refused and does not charge."""
        ...

    def charge(self, reservation: Usage, usage: Usage | None) -> None:
        """Replace a reservation by what the endpoint reports; without a report the worst case is charged."""
        ...


class NoBudget:
    """The `CallBudget` of calls that nothing bounds."""

    def reserve(self, prompt_tokens: int, output_tokens: int) -> Usage:
        return Usage(prompt_tokens, output_tokens)

    def release(self, reservation: Usage) -> None: ...

    def charge(self, reservation: Usage, usage: Usage | None) -> None: ...


class EndpointError(Exception):
    """The endpoint cannot be used; the text names the error and the mend. `status` is None without an answer."""

    def __init__(self, text: str, *, reason: str, status: int | None = None, is_prompt_too_long: bool = False) -> None:
        super().__init__(text)
        self.reason = reason
        """The same without a subject, the address and the endpoint's own words: "answered 404 Not Found: ..."."""
        self.status = status
        self.is_prompt_too_long = is_prompt_too_long


@dataclass(frozen=True)
class EndpointReply:
    """One reply of the model."""

    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    is_cut: bool = False
    """Whether it ended at its limit of tokens."""

    def as_message(self) -> Message:
        return as_reply(self.content, self.tool_calls)


class ChatEndpoint:
    """The model at an endpoint. `role` is its section of the settings, which every message names: "teacher"."""

    def __init__(
        self,
        role: str,
        config: EndpointConfig,
        *,
        api_key: str | None = None,
        budget: CallBudget | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        assert config.url is not None and config.model is not None
        self.model = config.model
        self.url = config.url.rstrip("/")
        self._role = role
        self._key_name = config.api_key
        self._api_key = api_key
        self._budget = budget or NoBudget()
        self._sleep = sleep
        # OpenAI's reasoning models refuse `max_tokens`; many other endpoints know no other name.
        self._limit_name = "max_tokens"
        # Once, because it reads all certificates; a client a call, because a client belongs to one event loop.
        self._tls = httpx.create_ssl_context()

    async def complete(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition] = (),
        *,
        max_tokens: int,
        response_format: dict[str, Any] | None = None,
    ) -> EndpointReply:
        """Return the reply to `messages`, of at most `max_tokens` tokens. Short failures are waited for.

        Raises:
            EndpointError: the endpoint refuses the call, or does not answer. Whatever the budget raises: the worst case
                does not fit into it, and nothing was sent.
        """
        # Its tokenizer is unknown here, so the marks of all families are broken.
        cleaned = await run_in_slices(ANY_FAMILY.cleaning_of_messages(messages))
        body: dict[str, Any] = {"model": self.model, "messages": cleaned}
        if tools:  # an empty list is refused
            body["tools"] = await run_in_slices(ANY_FAMILY.cleaning_of(list(tools)))
        if response_format is not None:
            body["response_format"] = response_format
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

    async def _try(self, body: dict[str, Any], max_tokens: int) -> EndpointReply:
        limit_name = self._limit_name  # another call may change it meanwhile
        reservation = self._budget.reserve(bound_prompt_tokens(body), max_tokens)
        try:
            response = await self._post({**body, limit_name: max_tokens})
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._budget.release(reservation)
            raise _Passing(self._unreachable(error)) from None
        except (httpx.TransportError, TimeoutError) as error:
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
        words = self._message_of(response)
        if response.status_code == 400 and limit_name == "max_tokens" and "max_completion_tokens" in words:
            self._limit_name = "max_completion_tokens"
            return await self._try(body, max_tokens)
        error = self._explain(response, words)
        if response.status_code in PASSING_STATUSES:
            raise _Passing(error, _retry_after(response))
        raise error

    async def _post(self, body: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else None
        timeout = httpx.Timeout(TRY_SECONDS, connect=CONNECT_SECONDS)
        # Around the whole of it: httpx bounds each read, and an answer may trickle in for ever.
        async with (
            asyncio.timeout(TRY_SECONDS),
            httpx.AsyncClient(timeout=timeout, headers=headers, follow_redirects=False, verify=self._tls) as http,
        ):
            return await http.post(f"{self.url}/chat/completions", json=body)

    def _unreachable(self, error: Exception) -> EndpointError:
        words = self._redact(f"{type(error).__name__} {error}".strip())
        mend = f"check {self._role}.url and the network"
        return EndpointError(
            f"the {self._role} at {self.url} does not answer ({words}): {mend}",
            reason=f"does not answer ({type(error).__name__}): {mend}",
        )

    def _message_of(self, response: httpx.Response) -> str:
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = response.text
        return self._redact(message)[:MAX_ERROR_CHARS]

    def _redact(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text

    def _explain(self, response: httpx.Response, words: str) -> EndpointError:
        status = response.status_code
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown status"
        answered, mend = f"answered {status} {phrase}", self._find_mend(status)
        # the words of a refused key may quote a part of it
        quoted = "" if status in (401, 403) else f" ({words or 'no reason given'})"
        return EndpointError(
            f"the {self._role} {self.model!r} at {self.url} {answered}{quoted}: {mend}",
            reason=f"{answered}: {mend}",
            status=status,
            is_prompt_too_long=status in (400, 413) and any(sign in response.text for sign in FULL_CONTEXT),
        )

    def _find_mend(self, status: int) -> str:
        if status in (401, 403):
            return (
                f"the key is refused: give the environment variable {self._key_name} a valid one"
                if self._key_name
                else f"set {self._role}.api_key to the name of the environment variable that holds its key"
            )
        if status == 429:
            return "its rate limit or quota is used up: try again later, or with fewer calls at a time"
        if status >= 500:
            return "it failed: try again later"
        if status == 404:
            return f"check {self._role}.model, and {self._role}.url, which ends before /chat/completions"
        if 300 <= status < 400:
            return f"redirects are not followed: give its final address as {self._role}.url"
        return "it refuses the request"

    def _read(self, answer: dict[str, Any]) -> EndpointReply:
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            content = message.get("content") or ""
            calls = [_read_call(call) for call in message.get("tool_calls") or []]
            if not isinstance(content, str):
                raise TypeError(content)
            return EndpointReply(clean(content), calls, choice.get("finish_reason") == "length")
        except (KeyError, IndexError, TypeError, AttributeError):
            mend = f"is no chat completion: check {self._role}.url"
            raise EndpointError(f"the answer of {self.url} {mend}", reason=f"sent what {mend}") from None


class _Passing(Exception):
    """A failure that may pass; `retry_after` is what the endpoint asks to wait, in seconds."""

    def __init__(self, error: EndpointError, retry_after: float | None = None) -> None:
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
