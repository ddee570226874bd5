"""Clients that disconnect: before the first token, in the middle of a stream, without a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from memory.schema import TrajectoryStage
from tests.runtime.api.playing import FORGETFUL, PlayedWorld
from tests.runtime.fake_engine import Reply
from tests.support.waiting import eventually

NUM_AT_ONCE = 8
FREED_SECONDS = 0.5
MOMENTS = ("before the first token", "in the middle", "without a stream")


async def dawdle(request: dict[str, Any]) -> Reply:
    """A policy that streams slowly without end, or never answers."""
    if not request["messages"][-1]["content"].startswith("in the middle"):
        await asyncio.sleep(3600)
    return Reply("word " * 1_000, pause_seconds=0.1)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PlayedWorld]:
    with PlayedWorld(tmp_path / "data", dawdle, memory_config=FORGETFUL) as world:
        yield world


async def ask_and_leave(http: aiohttp.ClientSession, world: PlayedWorld, text: str) -> float:
    """Send a request, disconnect at the moment that the text names, and return the time."""
    is_stream = not text.startswith("without a stream")
    body = {"model": "agent", "messages": [{"role": "user", "content": text}], "stream": is_stream}
    asking = asyncio.ensure_future(http.post("/v1/chat/completions", json=body))
    if text.startswith("in the middle"):
        answer = await asking
        await answer.content.readline()
        left_at = time.monotonic()
        answer.close()
        return left_at
    while not any(text == request["messages"][-1]["content"] for request in world.fake.requests):
        await asyncio.sleep(0.01)
    left_at = time.monotonic()
    asking.cancel()
    await asyncio.wait({asking})
    return left_at


async def leave_all(world: PlayedWorld, num_clients: int) -> dict[str, float]:
    texts = [f"{MOMENTS[number % 3]} {number}" for number in range(num_clients)]
    left_at: dict[str, float] = {}
    async with aiohttp.ClientSession(world.url) as http:
        for start in range(0, num_clients, NUM_AT_ONCE):
            batch = texts[start : start + NUM_AT_ONCE]
            moments = await asyncio.gather(*(ask_and_leave(http, world, text) for text in batch))
            left_at |= dict(zip(batch, moments, strict=True))
    return left_at


@pytest.mark.parametrize("num_clients", [12, pytest.param(1_000, marks=pytest.mark.slow)])
def test_who_leaves_frees_the_engine_and_is_recorded_cancelled(world: PlayedWorld, num_clients: int) -> None:
    left_at = asyncio.run(leave_all(world, num_clients))

    assert eventually(lambda: world.fake.num_broken_off == num_clients)
    assert world.fake.num_under_way == 0
    limit = FREED_SECONDS if num_clients >= 1_000 else 10 * FREED_SECONDS  # the full count runs on an idle machine
    for moment in MOMENTS:
        waits = sorted(at - left_at[text] for text, at in world.fake.broken_off_at if text.startswith(moment))
        middle, worst = waits[len(waits) // 2] * 1e3, waits[-1] * 1e3
        print(f"left {moment}: the engine was free after {middle:.0f} ms (median), {worst:.0f} ms (worst)")
        assert worst < limit * 1e3

    def stages() -> list[TrajectoryStage]:
        return [view.trajectory.stage for view in world.memory.trajectories.select(limit=10_000)]

    assert eventually(lambda: stages() == [TrajectoryStage.CANCELLED] * num_clients)
