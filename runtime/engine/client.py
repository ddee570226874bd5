"""Client of a running vLLM server over HTTP: completions with their token ids, log-probs, adapters.

It uses aiohttp directly: httpx collapses at a few hundred requests per second, and the models of OpenAI's client have
no fields for token ids.

Invariants: every failure is a `PolicyError` with the engine's own message (a full context is a `BudgetExceeded`); a
cancelled call frees the engine, because vLLM drops a request as soon as its connection closes.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from memory.chat_marks import ANY_FAMILY, ChatMarks
from memory.conversation import as_reply
from memory.schema import clean
from runtime.engine.forced_calls import ask_for_schemas
from runtime.errors import (
    AdapterError,
    BudgetExceeded,
    EngineBusy,
    EngineError,
    EngineLost,
    PolicyError,
    RequestRefused,
)

CONNECT_SECONDS = 5.0
# vLLM closes idle connections after 5 seconds; a call that reuses one at that moment would fail.
KEEP_ALIVE_SECONDS = 3.0
MAX_EVENT_BYTES = 2**25
"""Limit of one event of a stream; the first event of a call holds all token ids of the prompt."""
FIRST_IN_LINE = -1_000
"""Priority of probes: ahead of all waiting calls."""

Message = dict[str, Any]
"""A message of a chat in OpenAI's form."""
ToolCall = dict[str, Any]
"""`{"id", "type", "function": {"name", "arguments"}}`; in a `Delta` a piece of one, with its `index`."""
ToolDefinition = dict[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`."""


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed reply: text, pieces of tool calls in OpenAI's form, and log-probs of the tokens."""

    text: str = ""
    calls: Sequence[ToolCall] = ()
    logprobs: Sequence[dict[str, Any]] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.calls or self.logprobs)


OnDelta = Callable[[Delta], Awaitable[None]]


@dataclass
class Completion:
    """One reply of a model: its text, its tool calls in OpenAI's form, and the exact token ids of prompt and output."""

    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"
    prompt_token_ids: list[int] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Of each output token, in OpenAI's form; empty unless requested."""
    stop_sequence: str | None = None
    """The text of the request's `stop` that ended the reply, if one did."""
    seconds: float = 0.0

    @property
    def output_logprobs(self) -> list[float] | None:
        """The log-prob, in nats, with which each output token was sampled; None where they were not requested, or are
        not one for each token."""
        # external engines send anything
        found = [each.get("logprob") for each in self.logprobs if isinstance(each, dict)]
        values = [value for value in found if isinstance(value, float | int)]
        return values if values and len(values) == len(self.output_token_ids) else None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def as_message(self) -> Message:
        """Return the reply as the next call's history shows it."""
        return as_reply(self.content, self.tool_calls)


class EngineClient:
    """Calls to one vLLM server at `url`, whose bare base model is served as `model`."""

    def __init__(
        self, url: str = "", model: str = "base", *, timeout_seconds: float = 600.0, api_key: str | None = None
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._timeout_seconds = timeout_seconds
        self._api_key = api_key
        self.has_priorities = False
        self.enforces_schemas = False
        """Whether the engine's own grammars hold the arguments of forced calls to their schemas."""
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False
        self.marks: ChatMarks = ANY_FAMILY
        """The special tokens of the model's tokenizer, which are removed from all text of a prompt."""

    async def chat(
        self, model: str, messages: Sequence[Message], tools: Sequence[ToolDefinition] | None = None, **sampling: Any
    ) -> Completion:
        """Return the reply of `model`; `sampling` goes to vLLM unchanged.

        Raises:
            PolicyError: the engine rejected the call or its answer is invalid; EngineBusy: it accepts no more calls;
                EngineLost: it died.
            BudgetExceeded: the messages fill the model's context.
        """
        started = time.monotonic()
        answer = await self._post("/v1/chat/completions", self._chat_body(model, messages, tools, sampling))
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            reply = Completion(
                content=clean(message.get("content") or ""),
                tool_calls=_normalize_calls(message.get("tool_calls") or []),
                finish_reason=choice.get("finish_reason") or "stop",
                prompt_token_ids=answer.get("prompt_token_ids") or [],
                output_token_ids=choice.get("token_ids") or [],
                logprobs=(choice.get("logprobs") or {}).get("content") or [],
                stop_sequence=_stop_sequence_of(choice),
                seconds=time.monotonic() - started,
            )
            _require_types(reply)
            return reply
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise PolicyError("the engine's answer makes no sense", quoted=_shorten(answer)) from error

    async def chat_stream(
        self,
        model: str,
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition] | None = None,
        *,
        on_delta: OnDelta,
        partial: Completion | None = None,
        **sampling: Any,
    ) -> Completion:
        """Return the reply like `chat`; `on_delta` is awaited with each piece of it. Raises as `chat` does.

        `partial` is filled as pieces arrive: after a cancellation it holds the tokens that were received.
        """
        started = time.monotonic()
        reply = Completion() if partial is None else partial
        reply.finish_reason = ""
        calls: dict[int, ToolCall] = {}
        body = self._chat_body(model, messages, tools, sampling) | {"stream": True}
        async for chunk in self._stream("/v1/chat/completions", body):
            try:
                delta = _add_chunk(reply, calls, chunk)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise PolicyError("a piece of the engine's answer makes no sense", quoted=_shorten(chunk)) from error
            if delta:
                await on_delta(delta)
        if not reply.finish_reason:
            raise EngineLost("the engine stopped in the middle of its answer")
        try:
            # Only the joined text: the two halves of a surrogate pair may arrive in two pieces.
            reply.content = clean(reply.content)
            # The ids stay as they were streamed: the client sends its results under those.
            reply.tool_calls = _normalize_calls([calls[index] for index in sorted(calls)])
            _require_types(reply)
        except (TypeError, AttributeError) as error:
            raise PolicyError("the engine's answer makes no sense", quoted=_shorten(reply)) from error
        reply.seconds = time.monotonic() - started
        return reply

    async def count_tokens(
        self, model: str, messages: Sequence[Message], tools: Sequence[ToolDefinition] | None = None
    ) -> int:
        """Return the number of tokens of the prompt that `chat` would send. Raises as `chat` does."""
        body = self._chat_body(model, messages, tools, {})
        del body["return_token_ids"]
        answer = await self._post("/tokenize", body)
        try:
            return int(answer["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyError("the engine's count of tokens makes no sense", quoted=_shorten(answer)) from error

    async def token_logprobs(self, model: str, token_ids: Sequence[int]) -> list[float]:
        """Return the log-prob, in nats, of each token given those before it.

        Returns:
            len(token_ids) - 1 values, since the first token has none.

        Raises:
            PolicyError
        """
        # `prompt_logprobs: 0` returns the prompt's own tokens only, keyed by the token id as a string.
        body = {"model": model, "prompt": list(token_ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = await self._post("/v1/completions", self._with_priority(body))
        try:
            rows = answer["choices"][0]["prompt_logprobs"][1:]
            return [row[str(token_id)]["logprob"] for token_id, row in zip(token_ids[1:], rows, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PolicyError("the engine's log-probs make no sense", quoted=_shorten(answer)) from error

    async def probe(self, model: str | None = None) -> bool:
        """Return whether `model` (the base by default) generates a real token."""
        # A generated token, not /health, which answers 200 on an engine that generates nothing (vllm#39863).
        body = {"model": model or self.model, "prompt": [1], "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        try:
            answer = await self._post("/v1/completions", self._with_priority(body))
            return answer["usage"]["completion_tokens"] == 1
        except (PolicyError, BudgetExceeded, KeyError, TypeError):
            return False

    async def num_tokens_so_far(self) -> float:
        """Return a count that grows with every prompt token and every generated token."""
        text = await self._request("GET", "/metrics")
        counters = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(counters))

    async def models(self) -> list[dict[str, Any]]:
        """Return the engine's list of models: the base, and every adapter with its `parent`."""
        return json.loads(await self._request("GET", "/v1/models"))["data"]

    async def adapters(self) -> set[str]:
        """Return the names of the adapters that are loaded now."""
        return {model["id"] for model in await self.models() if model.get("parent")}

    async def load_adapter(self, name: str, path: str) -> None:
        """Load the adapter in the absolute directory `path`. An adapter that is loaded already is no error.

        Raises:
            AdapterError: the engine rejected it.
            EngineError: the engine does not answer.
        """
        try:
            # Never `load_inplace`: vLLM 0.32 then reads the files again at every step.
            await self._change_adapters("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        except AdapterError as error:
            # vLLM has no code for it: the wording of 0.32 is the only sign.
            if "already been loaded" not in str(error):
                raise

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter; calls under way finish with it. An adapter that is not loaded is no error.

        Raises: as `load_adapter`.
        """
        try:
            # vLLM forgets only the name; the weights stay in memory until its LRU evicts them (vllm#54839).
            await self._change_adapters("/v1/unload_lora_adapter", {"lora_name": name})
        except AdapterError as error:
            # As above: the wording of vLLM 0.32.
            if "cannot be found" not in str(error):
                raise

    async def close(self) -> None:
        """Close the connections, for good: a call that comes later raises EngineLost and opens none."""
        self._is_closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _change_adapters(self, path: str, body: dict[str, Any]) -> None:
        try:
            await self._request("POST", path, body)
        except PolicyError as error:
            if error.status is None:
                # No status means no answer: nothing is known of the adapter, and `HotSwap.follow` retries after an
                # EngineError.
                raise EngineError(str(error)) from error
            raise AdapterError(f"the engine refused adapter {body['lora_name']!r}: {error}") from error

    def _chat_body(
        self,
        model: str,
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition] | None,
        sampling: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the body of a chat call. All text of a prompt passes here, so special tokens are removed here."""
        # Token ids as sampled: training on a chat that is rendered again would learn other tokens.
        body = {"model": model, "messages": self.marks.clean_messages(messages), "return_token_ids": True}
        if tools:  # vLLM rejects an empty list
            tools = tools if self.enforces_schemas else ask_for_schemas(tools, sampling.get("tool_choice"))
            body["tools"] = self.marks.clean(list(tools))
        body |= {key: value for key, value in sampling.items() if value is not None}
        if "chat_template_kwargs" in body:  # a template may write them into the prompt
            body["chat_template_kwargs"] = self.marks.clean(body["chat_template_kwargs"])
        return body

    def _with_priority(self, body: dict[str, Any]) -> dict[str, Any]:
        return body | {"priority": FIRST_IN_LINE} if self.has_priorities else body

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        text = await self._request("POST", path, body)
        try:
            return json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            raise PolicyError("the engine's answer is not JSON", quoted=_shorten(text)) from None

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        try:
            async with self._open_session().request(method, self.url + path, json=body) as response:
                text = await response.text()
                _raise_error(response.status, text)
                return text
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _connection_error(error) from error

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the server-sent events of a call, decoded."""
        try:
            async with self._open_session().post(self.url + path, json=body) as response:
                if response.status != 200:
                    _raise_error(response.status, await response.text())
                async for line in _split_lines(response.content.iter_any()):
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    if data and line.startswith(b"data:"):
                        yield _decode_event(data)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _connection_error(error) from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._is_closed:
            raise aiohttp.ClientConnectionError("the client is closed")
        # At the first use, because a session belongs to the running event loop.
        if self._session is None or self._session.closed:
            # `sock_read` is the time between two pieces; without a stream the whole answer is one piece.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=self._timeout_seconds)
            # No limit: at aiohttp's 100 connections a probe would wait behind calls, out of reach of its priority.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
            headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else None
            self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers)
        return self._session


def _add_chunk(reply: Completion, calls: dict[int, ToolCall], chunk: dict[str, Any]) -> Delta:
    """Add one event of a stream to the reply; return its piece of it."""
    if chunk.get("prompt_token_ids"):
        reply.prompt_token_ids = chunk["prompt_token_ids"]
    if not chunk["choices"]:  # the last event may hold only the usage
        return Delta()
    choice = chunk["choices"][0]
    delta = choice.get("delta") or {}
    reply.output_token_ids += choice.get("token_ids") or []
    reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    reply.stop_sequence = _stop_sequence_of(choice) or reply.stop_sequence
    pieces = [_add_call_piece(calls, piece) for piece in delta.get("tool_calls") or []]
    text = delta.get("content") or ""
    reply.content += text
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    reply.logprobs += logprobs
    return Delta(text, pieces, logprobs)


def _stop_sequence_of(choice: Mapping[str, Any]) -> str | None:
    # vLLM's field, which holds the id of a token where such a one ended the reply.
    reason = choice.get("stop_reason")
    return clean(reason) if isinstance(reason, str) else None


def _add_call_piece(calls: dict[int, ToolCall], piece: ToolCall) -> ToolCall:
    """Add a piece of a tool call to the call; return it in OpenAI's form, with a unique id."""
    index = piece.get("index", 0)
    function = piece.get("function") or {}
    name, arguments = function.get("name") or "", function.get("arguments") or ""
    normalized: ToolCall = {"index": index, "function": {"name": name, "arguments": arguments}}
    if index not in calls:
        seen = {call["id"] for call in calls.values()}
        calls[index] = {"id": _unique_id(piece.get("id"), seen, index), "function": {"name": "", "arguments": ""}}
        normalized |= {"id": calls[index]["id"], "type": "function"}
    calls[index]["function"]["name"] += name
    calls[index]["function"]["arguments"] += arguments
    return normalized


def _require_types(reply: Completion) -> None:
    """Raise TypeError unless all fields have the types that the database stores: external engines send anything."""
    call_texts = [part for call in reply.tool_calls for part in (call["id"], *call["function"].values())]
    texts = [reply.content, reply.finish_reason, *call_texts]
    lists = [reply.prompt_token_ids, reply.output_token_ids, reply.logprobs]
    is_sound = all(type(text) is str for text in texts) and all(type(each) is list for each in lists)
    if not is_sound or not {*map(type, reply.prompt_token_ids), *map(type, reply.output_token_ids)} <= {int}:
        raise TypeError("a reply of texts and numbers was expected")


def _normalize_calls(calls: list[ToolCall]) -> list[ToolCall]:
    """Return the calls in OpenAI's form with unique ids: a repeated id would assign one result to two calls."""
    normalized: list[ToolCall] = []
    seen: set[str] = set()
    for number, call in enumerate(calls):
        call_id = _unique_id(call.get("id"), seen, number)
        seen.add(call_id)
        name, arguments = call["function"]["name"], call["function"].get("arguments")
        function = {"name": clean(name or ""), "arguments": clean(arguments or "")}
        normalized.append({"id": call_id, "type": "function", "function": function})
    return normalized


def _unique_id(call_id: str | None, seen: set[str], number: int) -> str:
    return call_id if call_id and call_id not in seen else f"{call_id or 'call'}-{number}"


def _raise_error(status: int, text: str) -> None:
    if status < 400:
        return
    try:
        message = json.loads(text)["error"]["message"]
    except (json.JSONDecodeError, KeyError, TypeError):
        message = _shorten(text)
    # vLLM's wording; it has no code for a full context.
    if status == 400 and "maximum context length" in message:
        raise BudgetExceeded(f"the conversation fills the model's context: {message}")
    raise _kind_of(status)(f"the engine answered {status}", status=status, quoted=message)


def _kind_of(status: int) -> type[PolicyError]:
    if status == 400:
        return RequestRefused
    # Before the other 5xx: as EngineLost, `_ask_policy` would repeat the call to a busy engine.
    if status in (429, 503):
        return EngineBusy
    return EngineLost if status >= 500 else PolicyError


def _decode_event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise PolicyError("a piece of the engine's answer is not JSON", quoted=_shorten(data)) from None
    if not isinstance(event, dict):
        raise PolicyError("a piece of the engine's answer makes no sense", quoted=_shorten(event))
    # After a 200 the status is sent already, so vLLM reports a failure as one more event.
    if "error" in event:
        problem = event["error"]
        message = problem.get("message") if isinstance(problem, dict) else problem
        raise EngineLost("the engine failed in the middle of its answer", quoted=str(message))
    return event


async def _split_lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield lines of up to MAX_EVENT_BYTES; aiohttp's own reader rejects lines longer than its buffer."""
    rest: list[bytes] = []
    num_bytes = 0
    async for piece in pieces:
        *ends, begun = piece.split(b"\n")
        for end in ends:
            yield b"".join([*rest, end])
            rest, num_bytes = [], 0
        rest.append(begun)  # joined once, at the line's end: a long line has hundreds of pieces
        num_bytes += len(begun)
        if num_bytes > MAX_EVENT_BYTES:
            raise PolicyError(f"a piece of the engine's answer is longer than {MAX_EVENT_BYTES} bytes")
    if num_bytes:
        yield b"".join(rest)


def _connection_error(error: Exception) -> PolicyError:
    # First: a ConnectionTimeoutError is a TimeoutError too. A silent engine is not EngineLost, because `_ask_policy`
    # would then make a call of `call_timeout_seconds` once more.
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return EngineLost(f"the engine cannot be reached: {error}")
    if isinstance(error, TimeoutError):
        return PolicyError("the engine is silent: no answer in time")
    return EngineLost(f"the engine broke off: {type(error).__name__}: {error}")


def _shorten(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 300 else text[:300] + "..."
