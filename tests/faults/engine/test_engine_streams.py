"""Arbitrary answers of the engine: each call ends in a reply or a typed failure, each episode is closed."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from memory.config import MemoryConfig
from memory.schema import TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, EngineConfig
from runtime.engine.client import Completion, Delta
from runtime.engine.process import Engine
from runtime.errors import EngineBusy, EngineLost, PolicyError
from runtime.serving.hotswap import HotSwap
from tests.memory.episodes import HashingEncoder
from tests.runtime.fake_engine import LOOK, FakeEngine, say
from tests.support.rollouts import play

ASK = [{"role": "user", "content": "hi"}]
NUM_AT_ONCE = 16
SILENCE_SECONDS = 1.0
HUGE_BYTES = 10_000_000

Send = Callable[[bytes], Awaitable[None]]
Fault = Callable[["Wire"], Awaitable[web.StreamResponse]]
Ending = type[Exception] | type[Completion]


class Wire:
    """One call in progress, on the engine's side."""

    def __init__(self, request: web.Request, dice: random.Random, is_stream: bool) -> None:
        self.request = request
        self.dice = dice
        self.is_stream = is_stream

    def whole(self, body: Any, status: int = 200) -> web.Response:
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

    async def open(self) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(self.request)
        return response

    async def say(self, *datas: Any, is_done: bool = True) -> web.StreamResponse:
        """Send the data as events of a stream, or the first one as a whole answer."""
        if not self.is_stream:
            return self.whole(datas[0])
        response = await self.open()
        for data in datas:
            text = data if isinstance(data, str) else json.dumps(data)
            await response.write(f"data: {text}\n\n".encode())
        if is_done:
            await response.write(b"data: [DONE]\n\n")
        return response


def choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, **fields}]}


async def refuse(wire: Wire) -> web.StreamResponse:
    return wire.whole({"error": {"message": "x" * wire.dice.randrange(1000)}}, wire.dice.choice([401, 404, 422]))


async def fail(wire: Wire) -> web.StreamResponse:
    body = wire.dice.choice(["", "oops", "<html>", '{"error": 7}', '{"error": {"message": null}}', "[]", "null"])
    return wire.whole(body, wire.dice.choice([500, 502, 504]))


async def be_full(wire: Wire) -> web.StreamResponse:
    return wire.whole({"error": {"message": "too many"}}, wire.dice.choice([429, 503]))


async def hang(wire: Wire) -> web.StreamResponse:
    if wire.is_stream and wire.dice.random() < 0.5:
        response = await wire.open()
        await response.write(f"data: {json.dumps(choice(delta={'content': 'a'}))}\n\n".encode())
    await asyncio.sleep(3600)
    raise AssertionError


async def drip(wire: Wire) -> web.StreamResponse:
    """Send a complete reply in tiny pieces."""
    events = [choice(delta={"content": "ø"}), choice(delta={}, finish_reason="stop")]
    whole = json.dumps(choice(message={"content": "ø"}, finish_reason="stop")).encode()
    text = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events) if wire.is_stream else whole
    response = await wire.open()
    for place in range(0, len(text), 7):
        await response.write(text[place : place + 7])
        await asyncio.sleep(0)
    return response


async def reset(wire: Wire) -> web.StreamResponse:
    response = await wire.open()
    for _ in range(wire.dice.randrange(3)):
        await response.write(b"data: " + json.dumps(choice(delta={"content": "a"})).encode() + b"\n\n")
    if wire.dice.random() < 0.5:
        await response.write(b'data: {"choices": [{"del')
    assert wire.request.transport is not None
    wire.request.transport.abort()
    return response


async def stop_short(wire: Wire) -> web.StreamResponse:
    if not wire.is_stream:
        return wire.whole('{"choices": [{"message": {"content": "ha')
    return await wire.say(choice(delta={"content": "half"}), is_done=wire.dice.random() < 0.5)


async def garble(wire: Wire) -> web.StreamResponse:
    return await wire.say(
        wire.dice.choice(["{broken", "7", '"a"', "nul", "[" * 100_000, "\x00", "{" * 50, "[]", "NaN"])
    )


async def choose_nothing(wire: Wire) -> web.StreamResponse:
    """Send choices that are missing, empty or of a wrong type."""
    odd = wire.dice.choice([{}, {"choices": 7}, {"choices": {}}, {"choices": [7]}, {"choices": [None]}])
    return await wire.say(odd if wire.dice.random() < 0.7 or wire.is_stream else {"choices": []})


async def mistype(wire: Wire) -> web.StreamResponse:
    """Send a reply with a field of a wrong type."""
    odd = wire.dice.choice([7, [7], {"a": 7}, True])
    name = wire.dice.choice(["content", "tool_calls", "token_ids", "prompt_token_ids", "logprobs", "finish_reason"])
    if name in ("content", "tool_calls"):
        said = {"content": "a", name: odd}
        return await wire.say(choice(delta=said, message=said, finish_reason="stop"))
    if name == "prompt_token_ids":
        return await wire.say(choice(delta={}, message={}, finish_reason="stop") | {name: "abc"})
    odd = "abc" if name == "token_ids" else [1, 2] if name == "logprobs" else {"a": 7}
    return await wire.say(choice(**{"delta": {}, "message": {}, "finish_reason": "stop", name: odd}))


async def repeat_ids(wire: Wire) -> web.StreamResponse:
    function = {"name": "look", "arguments": "{}"}
    calls = [{"index": index, "id": "same", "type": "function", "function": function} for index in range(3)]
    said = {"content": None, "tool_calls": calls}
    return await wire.say(choice(delta=said, message=said, finish_reason="tool_calls"))


async def send_much(wire: Wire) -> web.StreamResponse:
    """Send ten megabytes in one piece: one event of text, or data that is no event."""
    if wire.dice.random() < 0.5:
        said = {"content": "a" * HUGE_BYTES}
        return await wire.say(choice(delta=said, message=said, finish_reason="stop"))
    return await wire.say("x" * HUGE_BYTES)


async def break_inside(wire: Wire) -> web.StreamResponse:
    return await wire.say({"error": wire.dice.choice([{"message": "the core died"}, "dead", None, 7])})


FAULTS: dict[Fault, tuple[Ending, ...]] = {
    refuse: (PolicyError,),
    fail: (EngineLost,),
    be_full: (EngineBusy,),
    hang: (PolicyError,),
    drip: (Completion,),
    reset: (EngineLost,),
    stop_short: (EngineLost, PolicyError),
    garble: (PolicyError,),
    choose_nothing: (PolicyError, EngineLost),
    mistype: (PolicyError,),
    repeat_ids: (Completion,),
    send_much: (Completion, PolicyError),
    break_inside: (EngineLost, PolicyError),
}
"""Fault -> the permitted outcomes, by class."""
RARE = {send_much: 0.01, hang: 0.2}
"""Slow faults are rarer: the share of their turns in which they are played."""


class BrokenEngine(FakeEngine):
    """Answers each chat request with the fault of its seed, and everything else like a healthy engine."""

    def __init__(self, base_dir: Path) -> None:
        super().__init__(say("hello"), base_dir=base_dir)
        self.played: list[Fault] = []

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        fault, dice = choose(int(body["seed"]))
        return await fault(Wire(request, dice, bool(body.get("stream"))))


def choose(seed: int) -> tuple[Fault, random.Random]:
    """Return the fault of this seed; all of them come in turn."""
    dice = random.Random(seed)
    fault = list(FAULTS)[seed % len(FAULTS)]
    if dice.random() > RARE.get(fault, 1.0) and seed >= len(FAULTS):
        fault = garble
    return fault, dice


async def end_of(engine: Engine, number: int) -> tuple[str, Ending, Any]:
    """Make the call of this number; return the fault, the class of the outcome, and the outcome."""
    fault, dice = choose(number)

    async def ignore(delta: Delta) -> None:
        pass

    try:
        async with asyncio.timeout(30):
            if dice.random() < 0.5:
                reply = await engine.client.chat("base", ASK, [LOOK], seed=number)
            else:
                reply = await engine.client.chat_stream("base", ASK, [LOOK], on_delta=ignore, seed=number)
    except PolicyError as error:
        return fault.__name__, type(error), error
    assert len({call["id"] for call in reply.tool_calls}) == len(reply.tool_calls)
    return fault.__name__, Completion, reply


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("num_streams", [130, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_whatever_the_engine_streams_a_reply_or_a_typed_failure_comes_of_it(
    base_dir: Path, tmp_path: Path, num_streams: int
):
    endings: Counter[tuple[str, str]] = Counter()
    unforeseen = []
    places = asyncio.Semaphore(NUM_AT_ONCE)
    async with BrokenEngine(base_dir) as broken:
        engine = Engine(EngineConfig(url=broken.url, call_timeout_seconds=SILENCE_SECONDS), tmp_path)
        await engine.start()

        async def play(number: int) -> None:
            async with places:
                name, kind, what = await end_of(engine, number)
            endings[name, kind.__name__] += 1
            is_late = kind is PolicyError and "silent" in str(what)  # any call may be late beside ten megabytes
            if kind not in FAULTS[choose(number)[0]] and not is_late:
                unforeseen.append((number, name, kind.__name__, str(what)[:200]))

        async with asyncio.TaskGroup() as group:
            for number in range(num_streams):
                group.create_task(play(number))
        await engine.stop()
    print(dict(endings))
    assert unforeseen == []
    assert {name for name, _ in endings} == {fault.__name__ for fault in FAULTS}


@pytest.mark.parametrize("num_episodes", [52, pytest.param(1_000, marks=pytest.mark.slow)])
async def test_whatever_the_engine_streams_the_episode_is_closed(base_dir: Path, tmp_path: Path, num_episodes: int):
    places = asyncio.Semaphore(NUM_AT_ONCE)

    async def ignore(delta: Delta) -> None:
        pass

    async def play_numbered(agent: Agent, number: int) -> None:
        on_delta = ignore if number % 2 else None
        async with places:
            await play(agent, messages=ASK, seed=number, on_delta=on_delta)

    with Memory.open(tmp_path / "data", MemoryConfig(memory_tokens=0), encoder=HashingEncoder()) as memory:
        async with BrokenEngine(base_dir) as broken:
            engine = Engine(EngineConfig(url=broken.url, call_timeout_seconds=SILENCE_SECONDS), tmp_path)
            await engine.start()
            await memory.policies.register_base("base")
            agent = Agent(memory, HotSwap(memory.policies, engine), {}, AgentConfig(max_steps=2, max_seconds=30))
            async with asyncio.TaskGroup() as group:
                for number in range(num_episodes):
                    group.create_task(play_numbered(agent, number))
            await engine.stop()
        closed = [view.trajectory for view in memory.trajectories.select(limit=num_episodes + 1)]
    assert len(closed) == num_episodes
    assert {it.stage for it in closed} == {TrajectoryStage.FINISHED, TrajectoryStage.FAILED}
    typed = ("PolicyError: ", "EngineLost: ", "EngineBusy: ", "RequestRefused: ", "BudgetExceeded: ")
    assert [it.error for it in closed if it.error and not it.error.startswith(typed)] == []
