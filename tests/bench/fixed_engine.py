"""A fake engine that answers after a fixed time: the few routes of vLLM that are needed, as cheap as Python can be.

It is a separate process, so that it shares only the machine with the measured code. To a request with tools it replies
with a call of the first one, as long as fewer than `--tool-calls` results are in the conversation; then, and without
tools, with text. It records the arrival of each call and the departure of its answer on the system's monotonic clock.

Flow: `FixedEngine` starts it -> requests -> `stamps` returns the times and clears them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict

import httptools
import uvloop

EPISODE = re.compile(rb"episode (\d+)")
"""Part of the first message: groups calls by episode."""
PROMPT_TOKENS, OUTPUT_TOKENS = 200, 16
Stamp = tuple[float, float]
"""Arrival of a call and departure of its answer, in seconds of the monotonic clock."""


class FixedEngine:
    """The engine's process: `with FixedEngine(delay_seconds=0.02) as engine: engine.url`."""

    def __init__(self, *, delay_seconds: float, num_tool_calls: int) -> None:
        self._command = [sys.executable, "-m", "tests.bench.fixed_engine"]
        self._command += ["--delay-seconds", str(delay_seconds), "--tool-calls", str(num_tool_calls)]
        self.url = ""

    def __enter__(self) -> FixedEngine:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._process.stdout.close()

    def stamps(self) -> dict[int, list[Stamp]]:
        """Return the stamps of each episode's calls in order, and clear them."""
        with urllib.request.urlopen(f"{self.url}/stamps", timeout=10) as answer:
            return {int(episode): [(came, left) for came, left in calls] for episode, calls in json.load(answer)}


class Connection(asyncio.Protocol):
    """One client's connection; one request at a time, as HTTP/1.1 clients send them."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._parser = httptools.HttpRequestParser(self)
        self._path, self._body = b"", bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path, self._body = url, bytearray()

    def on_body(self, piece: bytes) -> None:
        self._body += piece

    def on_message_complete(self) -> None:
        if self._path != b"/v1/chat/completions":
            self._answer(self._script.answer_other(self._path))
            return
        came = time.monotonic()
        body = bytes(self._body)
        answer = self._script.answer_chat(body)
        loop = asyncio.get_running_loop()
        loop.call_at(loop.time() + self._script.delay_seconds, self._answer_chat, body, answer, came)

    def _answer_chat(self, body: bytes, answer: bytes, came: float) -> None:
        self._script.note(body, came, time.monotonic())
        self._answer(answer)

    def _answer(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)  # writes nothing if the client has disconnected


class Script:
    """The engine's answers, and its stamps."""

    def __init__(self, delay_seconds: float, num_tool_calls: int) -> None:
        self.delay_seconds = delay_seconds
        self._num_tool_calls = num_tool_calls
        self._stamps: dict[int, list[Stamp]] = defaultdict(list)

    def answer_chat(self, body: bytes) -> bytes:
        request = json.loads(body)
        tools, num_results = request.get("tools"), body.count(b'"tool_call_id"')
        message = {"role": "assistant", "content": "The invoice is due on May 2, says the ledger."}
        if tools and num_results < self._num_tool_calls:
            function = {"name": tools[0]["function"]["name"], "arguments": '{"number": "4711"}'}
            call = {"id": f"call_{num_results}", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if "tool_calls" in message else "stop"}
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1_700_000_000, "model": request["model"]}
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
        answer["usage"] = usage | {"total_tokens": PROMPT_TOKENS + OUTPUT_TOKENS}
        if request.get("return_token_ids"):
            choice["token_ids"] = list(range(1_000, 1_000 + OUTPUT_TOKENS))
            answer["prompt_token_ids"] = list(range(1_000, 1_000 + PROMPT_TOKENS))
        return json.dumps(answer | {"choices": [choice]}).encode()

    def answer_other(self, path: bytes) -> bytes:
        if path == b"/stamps":
            stamps, self._stamps = self._stamps, defaultdict(list)
            return json.dumps(list(stamps.items())).encode()
        if path == b"/v1/models":
            return b'{"data": [{"id": "base", "object": "model", "root": "nowhere", "parent": null}]}'
        return b'{"choices": [{"text": "x"}], "usage": {"completion_tokens": 1}}'  # a probe

    def note(self, body: bytes, came: float, left: float) -> None:
        if episode := EPISODE.search(body):
            self._stamps[int(episode[1])].append((came, left))


async def serve(script: Script) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Connection(script), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay-seconds", type=float, required=True)
    parser.add_argument("--tool-calls", type=int, required=True)
    given = parser.parse_args()
    uvloop.run(serve(Script(given.delay_seconds, given.tool_calls)))
