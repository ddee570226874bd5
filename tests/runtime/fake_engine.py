"""A fake engine: the few routes of vLLM that the runtime uses, over real HTTP, with a scripted policy behind them.

Token ids are the code points of the text's characters, so that they are readable.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from memory.adapters import read_manifest

Script = Callable[[dict[str, Any]], "Reply | Awaitable[Reply]"]


@dataclass
class Reply:
    """The reply of the scripted policy; `status` makes the engine refuse instead."""

    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # (tool name, arguments as JSON)
    status: int = 200
    error: str = ""
    is_cut: bool = False
    stopped_by: str | None = None
    """The text of the request's `stop` that ended it."""
    output_ids: list[int] | None = None  # None: the characters
    pause_seconds: float = 0.0  # between two pieces of a stream
    retry_after: str | None = None
    """The `Retry-After` header of a refusal."""

    @property
    def finish_reason(self) -> str:
        return "length" if self.is_cut else "tool_calls" if self.calls else "stop"


def say(text: str) -> Script:
    return lambda request: Reply(text)


def call(name: str, **arguments: Any) -> Reply:
    return Reply(calls=[(name, json.dumps(arguments))])


def ids_of(text: str) -> list[int]:
    return [ord(character) for character in text]


def base_logprobs(token_ids: list[int]) -> list[float]:
    return [-(token_id % 7) - 0.5 for token_id in token_ids[1:]]


LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look somewhere.",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]},
    },
}
"""A tool's definition, in OpenAI's form."""


class FakeEngine:
    """`async with FakeEngine(script) as engine: engine.url`. `requests` holds every chat request."""

    def __init__(self, script: Script, *, base_dir: Path | None = None) -> None:
        self.script = script
        self.base_dir = base_dir
        self.requests: list[dict[str, Any]] = []
        self.adapters: dict[str, Path] = {}
        self.ever_loaded: list[str] = []
        self.ignores_adapters = False
        self.is_zombie = False
        self.broken_off_at: list[tuple[str, float]] = []
        """The last message of each request whose client disconnected, and the time of detection."""
        self.num_under_way = 0
        self.num_tokens = 0
        self.num_calls = 0
        self.api_key: str | None = None
        """Required on every route under /v1, as in vLLM."""
        self.breaks_off_after: int | None = None
        """Number of events after which a stream's connection is closed."""
        self.render_prompt = _prompt_ids
        self.max_model_len: int | None = 4096
        self.port = 0
        """The port to listen on; 0 takes a free one."""
        self.url = ""

    async def __aenter__(self) -> FakeEngine:
        app = web.Application(client_max_size=2**26, middlewares=[self._ask_for_key])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        # As in vLLM, a disconnected client's request is cancelled.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @web.middleware
    async def _ask_for_key(self, request: web.Request, handler: Any) -> web.StreamResponse:
        is_known = self.api_key is None or request.headers.get("Authorization") == f"Bearer {self.api_key}"
        if request.path.startswith("/v1") and not is_known:
            return _error(401, "Unauthorized")
        return await handler(request)

    @property
    def num_broken_off(self) -> int:
        return len(self.broken_off_at)

    def forget_adapters(self) -> None:
        """Drop the adapters, as a restart does."""
        self.adapters.clear()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        if body["model"] != "base" and body["model"] not in self.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.")
        self.num_under_way += 1
        try:
            reply = self.script(body)
            if not isinstance(reply, Reply):
                reply = await reply
            if reply.status != 200:
                return _error(reply.status, reply.error, retry_after=reply.retry_after)
            return await self._stream(request, body, reply) if body.get("stream") else self._answer(body, reply)
        except (asyncio.CancelledError, ConnectionResetError):
            self.broken_off_at.append((str(body["messages"][-1]["content"]), time.monotonic()))
            raise
        finally:
            self.num_under_way -= 1

    def _answer(self, body: dict[str, Any], reply: Reply) -> web.Response:
        message = {"role": "assistant", "content": reply.content or None, "tool_calls": self._calls(reply)}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
        choice |= {"stop_reason": reply.stopped_by}
        choice |= {"token_ids": _output_ids(reply), "logprobs": _logprobs(body, reply.content)}
        self.num_tokens += len(_output_ids(reply))
        prompt_ids = self.render_prompt(body)
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(_output_ids(reply))}
        return web.json_response({"choices": [choice], "prompt_token_ids": prompt_ids, "usage": usage})

    def _calls(self, reply: Reply) -> list[dict[str, Any]]:
        """Return the calls with unique ids, as vLLM makes them."""
        first, self.num_calls = self.num_calls, self.num_calls + len(reply.calls)
        return [
            {"id": f"call-{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(reply.calls, first)
        ]

    async def _stream(self, request: web.Request, body: dict[str, Any], reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chunks: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}]
        # As in vLLM, each piece has its own tokens, unless the test sets them.
        has_ids = reply.output_ids is None
        for it in reply.content:
            ids = {"token_ids": ids_of(it)} if has_ids else {}
            chunks.append({"delta": {"content": it}, "logprobs": _logprobs(body, it), **ids})
        for index, tool_call in enumerate(self._calls(reply)):
            head, text = tool_call["function"]["name"], tool_call["function"]["arguments"]
            start = {"index": index, "id": tool_call["id"], "function": {"name": head}}
            chunks.append({"delta": {"tool_calls": [start]}})
            for part in (text[: len(text) // 2], text[len(text) // 2 :]):
                chunks.append({"delta": {"tool_calls": [{"index": index, "function": {"arguments": part}}]}})
        end = {"finish_reason": reply.finish_reason, "stop_reason": reply.stopped_by}
        chunks.append({"delta": {}, **end, "token_ids": _output_ids(reply)[len(reply.content) if has_ids else 0 :]})
        for number, chunk in enumerate(chunks):
            event: dict[str, Any] = {"choices": [{"index": 0, **chunk}]}
            if number == 0:
                event["prompt_token_ids"] = self.render_prompt(body)
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            if number == self.breaks_off_after:
                request.transport.abort()
                return response
            await asyncio.sleep(reply.pause_seconds)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.is_zombie:
            await asyncio.sleep(3600)
        if body["model"] != "base" and body["model"] not in self.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.")
        self.num_tokens += 1
        token_ids = body["prompt"]
        logprobs = base_logprobs(token_ids)
        if body["model"] in self.adapters and not self.ignores_adapters:
            logprobs = read_manifest(self.adapters[body["model"]]).fingerprint.adapter_logprobs
        rows = [{str(it): {"logprob": value}} for it, value in zip(token_ids[1:], logprobs, strict=False)]
        choice = {"text": "x", "prompt_logprobs": [None, *rows]}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 1}})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        token_ids = self.render_prompt(body)
        return web.json_response({"count": len(token_ids), "tokens": token_ids, "max_model_len": self.max_model_len})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["lora_name"] in self.adapters:
            return _error(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
        self.adapters[body["lora_name"]] = Path(body["lora_path"])
        self.ever_loaded.append(body["lora_name"])
        return web.Response(text="Success")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return web.Response(text="Success")

    async def _models(self, request: web.Request) -> web.Response:
        base: dict[str, Any] = {"id": "base", "root": str(self.base_dir or "nowhere"), "parent": None}
        if self.max_model_len is not None:
            base["max_model_len"] = self.max_model_len
        return web.json_response({"data": [base, *({"id": name, "parent": "base"} for name in self.adapters)]})

    async def _metrics(self, request: web.Request) -> web.Response:
        if self.is_zombie:
            return web.Response(text='vllm:generation_tokens_total{engine="0"} 7.0\n')
        return web.Response(text=f'vllm:generation_tokens_total{{engine="0"}} {self.num_tokens}.0\n')


def _error(status: int, message: str, *, retry_after: str | None = None) -> web.Response:
    headers = None if retry_after is None else {"Retry-After": retry_after}
    body = {"error": {"message": message, "type": "Error", "code": status}}
    return web.json_response(body, status=status, headers=headers)


def _logprobs(body: dict[str, Any], text: str) -> dict[str, Any] | None:
    """Return log-probs of each character, with the requested number of alternatives: a, b, c ..."""
    if not body.get("logprobs"):
        return None
    others = [
        {"token": chr(97 + n), "logprob": -2.0 - n, "bytes": [97 + n]} for n in range(body.get("top_logprobs") or 0)
    ]
    return {
        "content": [{"token": it, "logprob": -0.5, "bytes": list(it.encode()), "top_logprobs": others} for it in text]
    }


def _prompt_ids(body: dict[str, Any]) -> list[int]:
    return ids_of("\n".join(f"{message['role']}: {message.get('content')}" for message in body["messages"]))


def _output_ids(reply: Reply) -> list[int]:
    if reply.output_ids is not None:
        return reply.output_ids
    return ids_of(reply.content + "".join(name + arguments for name, arguments in reply.calls))
