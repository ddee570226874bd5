"""Ten times the engine's capacity: admitted requests are answered in time, the rest are rejected at once."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from memory.schema import TrajectoryStage
from runtime.config import EngineConfig
from tests.runtime.api.playing import FORGETFUL, PlayedWorld
from tests.runtime.fake_engine import Reply

NUM_SEQS = 8
FULL_SECONDS = 60.0
REFUSED_SECONDS, RECOVERY_SECONDS = 0.05, 5.0
CALL_SECONDS = 0.5
CAPACITY = NUM_SEQS / CALL_SECONDS
"""Requests a second that the fake engine answers."""


class Slots:
    """A policy with a fixed time for each reply and a fixed number of slots. For each request it counts the others
    that were answered meanwhile, a figure that other load on the machine cannot change."""

    def __init__(self, num_seqs: int, seconds: float) -> None:
        self._num_seqs, self._seconds = num_seqs, seconds
        self._slots: asyncio.Semaphore | None = None
        self.most_at_once = self._num_now = self._num_answered = 0
        self.answered_meanwhile: list[int] = []

    async def __call__(self, request: dict[str, Any]) -> Reply:
        self._slots = self._slots or asyncio.Semaphore(self._num_seqs)  # created in the engine's event loop
        before = self._num_answered
        self._num_now += 1
        self.most_at_once = max(self.most_at_once, self._num_now)
        async with self._slots:
            await asyncio.sleep(self._seconds)
        self._num_now -= 1
        self._num_answered += 1
        self.answered_meanwhile.append(self._num_answered - before - 1)
        return Reply("done")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PlayedWorld]:
    script = Slots(NUM_SEQS, CALL_SECONDS)
    sized = {"max_num_seqs": NUM_SEQS}
    with PlayedWorld(tmp_path / "data", script, engine_config=sized, memory_config=FORGETFUL) as world:
        gc.collect()
        gc.freeze()  # as the server does after startup: a full collection takes up to 0.4 s
        yield world
        gc.unfreeze()


@dataclass(frozen=True)
class Told:
    """The response that one client got."""

    status: int
    seconds: float
    retry_after: str | None
    code: str | None


async def ask(http: aiohttp.ClientSession, number: int = 0) -> Told:
    started = time.monotonic()
    body = {"model": "agent", "messages": [{"role": "user", "content": f"hi {number}"}], "stream": number % 2 == 1}
    async with http.post("/v1/chat/completions", json=body) as answer:
        read = await answer.read() if answer.status == 200 else await answer.json()
    code = None if answer.status == 200 else read["error"]["code"]
    return Told(answer.status, time.monotonic() - started, answer.headers.get("Retry-After"), code)


async def come(http: aiohttp.ClientSession, *, per_second: float, seconds: float) -> list[Told]:
    """Send requests open-loop; return the responses in the order of arrival."""
    told: list[Told] = []

    async def ask_one(number: int) -> None:
        told.append(await ask(http, number))

    began = time.monotonic()
    async with asyncio.TaskGroup() as asking:
        for number in range(int(per_second * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
            asking.create_task(ask_one(number))
    return told


def p99(told: list[Told]) -> float:
    return sorted(it.seconds for it in told)[int(len(told) * 0.99)]


async def overload(url: str, seconds: float) -> tuple[list[Told], list[Told], float]:
    """Load the engine at half of its capacity, then at ten times; return both, and the seconds of recovery."""
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as http:
        nominal = await come(http, per_second=0.5 * CAPACITY, seconds=seconds / 4)
        told = await come(http, per_second=10 * CAPACITY, seconds=seconds)
        ended = time.monotonic()
        while (await ask(http)).seconds > 1.5 * CALL_SECONDS and time.monotonic() - ended < 30:
            pass
        return nominal, told, time.monotonic() - ended


@pytest.mark.parametrize("seconds", [1.5, pytest.param(FULL_SECONDS, marks=pytest.mark.slow)])
def test_overload_is_turned_away_at_once_and_harms_nobody_who_was_let_in(world: PlayedWorld, seconds: float) -> None:
    nominal, told, recovery_seconds = asyncio.run(overload(world.url, seconds))
    refused = [it for it in (*nominal, *told) if it.status != 200]
    nominal, admitted = ([it for it in each if it.status == 200] for each in (nominal, told))

    assert nominal and admitted and refused
    assert {(it.status, it.retry_after, it.code) for it in refused} == {(503, "1", "engine_overloaded")}
    views = world.memory.trajectories.select(limit=100_000)
    assert {view.trajectory.stage for view in views} == {TrajectoryStage.FINISHED}
    num_recovered = len(views) - len(nominal) - len(admitted)
    assert num_recovered >= 1, "nothing was answered afterwards, or an answer has no record"
    shed = world.services.agent.telemetry.registry.get_sample_value
    assert shed("ratchet_shed_total", {"reason": "engine_overloaded"}) == len(refused)

    # An admitted request waited for one round of others at most, so twice the time of a call; a rejected one never
    # reached the engine.
    slots, most = world.fake.script, EngineConfig(max_num_seqs=NUM_SEQS).max_turns
    assert slots.most_at_once <= most and max(slots.answered_meanwhile) < most
    assert len(world.fake.requests) == len(views)
    if seconds >= FULL_SECONDS:  # a shorter run has too few requests for a percentile
        assert p99(admitted) <= 2 * p99(nominal)
        assert p99(refused) < REFUSED_SECONDS and recovery_seconds < RECOVERY_SECONDS
    print(
        f"\n{len(nominal)} at 0.5x: p99 {p99(nominal):.3f} s; {len(admitted)} let in at 10x: p99 {p99(admitted):.3f} s,"
        f" {p99(admitted) / p99(nominal):.2f} times; {len(refused)} turned away: p99 {p99(refused) * 1e3:.1f} ms, "
        f"worst {max(it.seconds for it in refused) * 1e3:.1f} ms; answered as usual {recovery_seconds:.2f} s afterwards"
    )


def test_an_engine_that_says_it_is_full_is_no_failure_of_the_server(world: PlayedWorld) -> None:
    world.fake.script = lambda request: Reply(status=503, error="The engine is currently busy.")
    with (
        openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.InternalServerError, match="currently busy") as told,
    ):
        client.chat.completions.create(model="agent", messages=[{"role": "user", "content": "hi"}])
    assert (told.value.status_code, told.value.code) == (503, "engine_overloaded")
    assert told.value.response.headers["retry-after"] == "1"
    assert world.newest.id == told.value.response.headers["x-trajectory-id"]
    assert world.newest.stage is TrajectoryStage.FAILED
