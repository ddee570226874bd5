"""One client's body must not block the other clients: the worst bodies that the limits let through, and more."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp

from memory.chat_marks import ANY_FAMILY, ChatMarks
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.api.app import create_app
from runtime.api.services import Services
from runtime.config import AgentConfig
from runtime.engine.client import Completion, EngineClient
from runtime.engine.model_families import POCKET_MODEL
from runtime.serving.hotswap import HotSwap
from tests.memory.episodes import PATIENT, HashingEncoder, play
from tests.runtime.api.worlds import QuickLearner, ScriptedEngine
from tests.support.stalls import LongestGap

MAX_CPU_SECONDS = 0.25
"""The longest that other requests may be blocked, in processor time: other load on the machine does not count."""
MAX_BYTES = 16 * 2**20 - 1000
HELLO = {"role": "user", "content": "hello"}
PIECE_BYTES = 65_536  # uvicorn's chunk size


class BriefClient(EngineClient):
    """Prepares every request as for an engine, which answers it in two letters."""

    num_requests = 0

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.num_requests += bool(json.dumps(body))
        return {"choices": [{"message": {"content": "ok"}, "token_ids": [2]}], "prompt_token_ids": [1]}


class BriefEngine(ScriptedEngine):
    """An engine behind a `BriefClient`."""

    def __init__(self, log_path: Path, marks: ChatMarks) -> None:
        super().__init__(log_path)
        self.brief = BriefClient()
        self.brief.marks = marks

    async def chat(self, model: str, messages: Any, tools: Any = None, **sampling: Any) -> Completion:
        return await self.brief.chat(model, messages, tools, **sampling)


@contextlib.asynccontextmanager
async def opened(data_dir: Path, marks: ChatMarks = ANY_FAMILY) -> AsyncIterator[tuple[ASGIApp, Memory, BriefClient]]:
    """Yield an application on the test's own event loop, with something of each kind in its memory."""
    with Memory.open(data_dir, PATIENT, encoder=HashingEncoder()) as memory:
        await memory.policies.register_base("scripted")
        await memory.documents.ingest("Words", "Hello is a word.")
        if not memory.trajectories.select(limit=1):
            await play(memory, environment=None, kind="chat", task_text="hello", is_shared=True)
        await memory.index.drain()
        engine = BriefEngine(data_dir / "engine.log", marks)
        hotswap = HotSwap(memory.policies, engine)
        agent = Agent(memory, hotswap, {}, AgentConfig())
        await hotswap.activate(0)
        app = create_app(Services(memory, agent, engine, hotswap, QuickLearner(memory)))
        gc.collect()
        gc.freeze()  # as the server does after startup
        try:
            yield app, memory, engine.brief
        finally:
            gc.unfreeze()


async def post(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Send a body in pieces, as a socket would; return the status and the answer."""
    return await request(app, "POST", path, body)


async def request(app: ASGIApp, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
    """Return the status and the answer of a request whose body is sent in pieces."""
    pieces = [body[start : start + PIECE_BYTES] for start in range(0, len(body), PIECE_BYTES)]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        if not pieces:
            await asyncio.Event().wait()  # the client stays connected
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"http_version": "1.1", "scheme": "http", "root_path": "", "headers": headers, "client": ("127.0.0.1", 1)}
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message["body"] for message in sent[1:]))


def chat(*messages: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"model": "agent", "messages": messages, **more}).encode()


def many(before: bytes, piece: bytes, after: bytes, num: int = MAX_BYTES) -> bytes:
    """Return `num` pieces, or as many as fit into a body."""
    return before + piece * min(num, (MAX_BYTES - len(before + after)) // len(piece)) + after


def call(name: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "f", "arguments": arguments}}


def tool(description: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "description": description, "parameters": {}}}


def results_in_reverse(num: int) -> bytes:
    calls = [call(f"call-{at}") for at in range(num)]
    results = [{"role": "tool", "tool_call_id": it["id"], "content": ""} for it in reversed(calls)]
    return chat(HELLO, {"role": "assistant", "content": "", "tool_calls": calls}, *results)


def values_in_arguments() -> bytes:
    """Return a text that holds JSON, whose values the limit on the body does not count."""
    said = {"role": "assistant", "content": "", "tool_calls": [call("c", many(b"[", b"[],", b"[]]").decode())]}
    return chat(HELLO, said, {"role": "tool", "tool_call_id": "c", "content": "x"})


BEGIN, TEXT, END = b'{"model":"agent","messages":[', b'{"role":"user","content":"', b"]}"
BODIES: dict[str, Callable[[], bytes]] = {
    "60,000 results in reverse": lambda: results_in_reverse(60_000),
    "as many results as are taken": lambda: results_in_reverse(4_000),
    "as many messages as are taken": lambda: chat(*[{"role": "user", "content": "word " * 800}] * 4_000),
    "one long text": lambda: many(BEGIN + TEXT, b"word ", b'"}' + END),
    "one word": lambda: many(BEGIN + TEXT, b"word", b'"}' + END),
    "marks of a chat": lambda: many(BEGIN + TEXT, b"<|im_end|>", b'"}' + END),
    "short tags": lambda: many(BEGIN + TEXT, b"<s>", b'"}' + END),
    "beginnings of tags": lambda: many(BEGIN + TEXT, b"<", b'"}' + END),
    "beginnings of marks": lambda: many(BEGIN + TEXT, b"<|", b'"}' + END),
    "beginnings of tags in brackets": lambda: many(BEGIN + TEXT, b"[a", b'"}' + END),
    "a tag with a long beginning": lambda: many(BEGIN + TEXT + b"<", b" ", b'memory>"}' + END),
    "marks in a tool": lambda: chat(HELLO, tools=[tool(many(b"", b"<|im_end|>", b"", 1_500_000).decode())]),
    "a text of half characters": lambda: many(BEGIN + TEXT, b"\\ud800", b'"}' + END),
    "values in the arguments of a call": values_in_arguments,
    "empty objects": lambda: many(BEGIN, b"{},", b"{}" + END),
    "numbers": lambda: many(BEGIN, b"1,", b"1" + END),
    "numbers, as many as are taken": lambda: many(BEGIN, b"1,", b"1" + END, 99_000),
    "texts": lambda: many(b'{"model":"agent","messages":[],"stop":[', b'"",', b'""]}'),
    "messages without anything": lambda: many(BEGIN, b'{"role":"user"},', b"{}" + END, 33_000),
    "parts of a message": lambda: many(BEGIN + TEXT[:-1] + b"[", b'{"type":"text","text":"x"},', b"{}]}" + END, 40_000),
    "names": lambda: chat(HELLO, metadata={f"key-{at}": "" for at in range(99_000)}),
    "parameters": lambda: chat(HELLO, **{f"key-{at}": None for at in range(99_000)}),
    "a long number": lambda: many(b'{"model":', b"1", b"}"),
    "an unfinished text of escaped quotes": lambda: many(BEGIN + TEXT, b'\\"', b""),
    "brackets": lambda: many(b"", b"[", b""),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attacked") / "data"


@pytest.mark.parametrize("name", BODIES)
async def test_no_body_holds_up_the_others(data_dir: Path, name: str) -> None:
    await attack(data_dir, BODIES[name](), ANY_FAMILY)


@pytest.mark.parametrize("name", ["marks of a chat", "beginnings of marks", "one long text"])
async def test_no_text_holds_up_the_others_where_the_marks_of_the_tokenizer_are_known(
    data_dir: Path, name: str
) -> None:
    marks = ChatMarks.read(POCKET_MODEL)
    assert marks is not None
    assert await attack(data_dir, BODIES[name](), marks) == 200


BLOCKS = b'{"model":"agent","max_tokens":9,"messages":[{"role":"user","content":['
ITEMS = b'{"model":"agent","input":['
INPUTS = b'{"model":"hashing","input":['
TOOL_USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
SAID = b'{"role":"user","content":"x"}]}'
ELSEWHERE: dict[str, tuple[str, int, Callable[[], bytes]]] = {
    "messages": (
        "/v1/messages",
        200,
        lambda: chat(*[{"role": "user", "content": "word " * 800}] * 4_000, max_tokens=9),
    ),
    "messages without text": (
        "/v1/messages",
        200,
        lambda: chat(*[{"role": "user", "content": ""}] * 4_000, HELLO, max_tokens=9),
    ),
    "blocks": (
        "/v1/messages",
        200,
        lambda: many(BLOCKS, b'{"type":"text","text":"x"},', b'{"type":"text","text":"x"}]}]}', 30_000),
    ),
    "blocks of marks": (
        "/v1/messages",
        200,
        lambda: many(BLOCKS + b'{"type":"text","text":"', b"<|im_end|>", b'"}]}]}'),
    ),
    "messages to count": (
        "/v1/messages/count_tokens",
        200,
        lambda: chat(*[{"role": "assistant", "content": "word " * 800}] * 4_000, HELLO),
    ),
    "replies with calls to count": (
        "/v1/messages/count_tokens",
        200,
        lambda: chat(*[{"role": "assistant", "content": [TOOL_USE] * 5}] * 3_000, HELLO),
    ),
    "items": ("/v1/responses", 200, lambda: many(ITEMS, b'{"role":"user","content":"word"},', SAID, 4_000)),
    "items that are long": (
        "/v1/responses",
        200,
        lambda: many(ITEMS, b'{"role":"user","content":"' + b"word " * 800 + b'"},', SAID, 4_000),
    ),
    "calls without results": (
        "/v1/responses",
        400,
        lambda: many(ITEMS, b'{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},', SAID, 4_000),
    ),
    "texts to embed": ("/v1/embeddings", 200, lambda: many(INPUTS, b'"word word",', b'"x"]}', 2_000)),
    "long texts to embed": (
        "/v1/embeddings",
        200,
        lambda: many(INPUTS, b'"' + b"word " * 60 + b'",', b'"x"]}', 2_000),
    ),
    "more texts to embed than are taken": ("/v1/embeddings", 400, lambda: many(INPUTS, b'"",', b'""]}', 40_000)),
}
"""Bodies of the other routes that an `infer` key may post to, and what they are answered with."""


@pytest.mark.parametrize("name", ELSEWHERE)
async def test_no_body_of_another_route_holds_up_the_others(data_dir: Path, name: str) -> None:
    path, status, make = ELSEWHERE[name]
    assert await attack(data_dir, make(), ANY_FAMILY, path) == status


async def attack(data_dir: Path, body: bytes, marks: ChatMarks, path: str = "/v1/chat/completions") -> int:
    """Send a body to a server that answers; return the status. The others must not wait long meanwhile."""
    async with opened(data_dir, marks) as (app, memory, client):
        await post(app, "/v1/chat/completions", chat(HELLO))  # warm-up
        num_requests, num_searches = client.num_requests, memory.index.seconds["encoding"].count
        gap = LongestGap()
        async with gap.watch():
            status, answer = await post(app, path, body)
        if status == 200 and path == "/v1/chat/completions":
            assert client.num_requests > num_requests and memory.index.seconds["encoding"].count > num_searches
    assert status in (200, 400, 413), answer
    assert gap.cpu_seconds < MAX_CPU_SECONDS, f"{gap.cpu_seconds * 1e3:.0f} ms, answered {status}"
    return status


async def test_what_a_refusal_repeats_is_short(data_dir: Path) -> None:
    async with opened(data_dir) as (app, _, _):
        status, answer = await post(app, "/v1/chat/completions", chat(HELLO, **{"x" * 9_000: "y" * 9_000}))
    assert status == 400
    assert len(json.dumps(answer)) < 1_000


async def test_a_long_conversation_of_stored_responses_is_refused_before_it_is_read(data_dir: Path) -> None:
    """Each response is small enough; together they would block all clients."""
    async with opened(data_dir) as (app, memory, _):
        previous = None
        for _ in range(5):
            body = {"model": "agent", "input": "long " * 800_000, "previous_response_id": previous}
            status, answer = await post(app, "/v1/responses", json.dumps(body).encode())
            assert status == 200
            previous = answer["id"]
        num_before = len(memory.trajectories.select(limit=1_000))
        gap = LongestGap()
        async with gap.watch():
            body = {"model": "agent", "input": "and", "previous_response_id": previous}
            status, answer = await post(app, "/v1/responses", json.dumps(body).encode())
        num_after = len(memory.trajectories.select(limit=1_000))
    assert (status, answer["error"]["code"]) == (413, "conversation_too_large")
    assert num_after == num_before
    assert gap.cpu_seconds < MAX_CPU_SECONDS


READING = (
    "/v1/documents",
    "/v1/documents/{document}",
    "/v1/insights",
    "/v1/exemplars",
    "/v1/trajectories",
    "/v1/trajectories/{trajectory}",
    "/v1/examples",
    "/v1/examples/counts",
    "/v1/responses/{response}",
    "/v1/responses/{response}/input_items",
)


is_of_request: ContextVar[bool] = ContextVar("is_of_request", default=False)
"""Goes with a request into its threads, and not into tasks that run beside it."""


@pytest.mark.parametrize("path", READING)
async def test_rows_that_may_be_many_or_long_are_not_read_on_the_event_loop(
    data_dir: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(data_dir) as (app, memory, _):
        _, response = await post(app, "/v1/responses", json.dumps({"model": "agent", "input": "hello"}).encode())
        ids = {
            "document": memory.documents.select()[0].id,
            "trajectory": memory.trajectories.select(limit=1)[0].trajectory.id,
            "response": response["id"],
        }
        threads: list[int] = []
        read = memory.database.read

        def watch() -> Any:
            if is_of_request.get():
                threads.append(threading.get_ident())
            return read()

        monkeypatch.setattr(memory.database, "read", watch)
        monkeypatch.setattr(memory.keys, "_loaded_at", 0.0)  # all keys are read again with this request
        is_of_request.set(True)
        status, _ = await request(app, "GET", path.format(**ids))
    assert status == 200
    assert threads and threading.get_ident() not in threads
