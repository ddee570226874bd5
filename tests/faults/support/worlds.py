"""The work of children until they are killed: an agent that plays many episodes at once on a fake engine.

Invariant: an episode's content follows from its name alone, so that another process can check a record byte by byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from memory.schema import RewardSource, StepKind, Trajectory
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, EngineConfig
from runtime.engine.process import Engine
from runtime.serving.hotswap import HotSwap
from runtime.tools.base import Tool
from tests.faults.support.children import Tell
from tests.memory.episodes import PATIENT, HashingEncoder
from tests.runtime.fake_engine import LOOK, FakeEngine, Reply, call, ids_of
from tests.support.rollouts import play

NUM_EPISODES = 64  # in parallel
PROMPT_IDS = list(range(500))


def num_looks(name: str) -> int:
    """Return how often an episode of this name calls its tool before it answers."""
    return random.Random(name).randint(0, 3)


def sight(where: str) -> str:
    """Return the tool's result: 3 KB and more, so that rows span pages."""
    return f"{where}: " + f"{where} is dusty. " * random.Random(where).randint(150, 250)


def answer_of(name: str) -> str:
    return f"{name} is done"


def expected_steps(name: str) -> list[tuple[str, str, list[int] | None]]:
    """Return (kind, content, output token ids) of every step of the episode, in order."""
    steps: list[tuple[str, str, list[int] | None]] = []
    for turn in range(num_looks(name)):
        arguments = json.dumps({"where": f"{name}/{turn}"})
        steps.append((StepKind.MODEL, "", ids_of("look" + arguments)))
        steps.append((StepKind.TOOL, sight(f"{name}/{turn}"), None))
    return [*steps, (StepKind.MODEL, answer_of(name), ids_of(answer_of(name)))]


def play_until_killed(tell: Tell, data_dir: Path, names: str) -> None:
    """Boot on the data of the last kill, then play episodes `<names>-<number>`, reporting acknowledgements."""
    asyncio.run(_play(tell, data_dir, names))


async def _play(tell: Tell, data_dir: Path, names: str) -> None:
    memory = Memory.open(data_dir, PATIENT, encoder=HashingEncoder())
    tell("booted", memory.database.check(), await memory.trajectories.close_orphans())
    async with playing(tell, memory) as agent:
        numbers = itertools.count()
        await asyncio.gather(*(_live(tell, memory, agent, names, numbers) for _ in range(NUM_EPISODES)))


@contextlib.asynccontextmanager
async def playing(tell: Tell, memory: Memory) -> AsyncIterator[Agent]:
    """An agent, its tool and its fake engine, all in this process."""

    def reply(request: dict[str, Any]) -> Reply:
        name = next(it["content"] for it in request["messages"] if it["role"] == "user").splitlines()[-1]
        turn = sum(message["role"] == "tool" for message in request["messages"])
        # A request for the next step implies that the steps before it are on disk.
        tell("stepped", name, 2 * turn)
        return call("look", where=f"{name}/{turn}") if turn < num_looks(name) else Reply(answer_of(name))

    async def look(arguments: dict[str, Any]) -> str:
        return sight(arguments["where"])

    async with FakeEngine(reply) as fake:
        fake.render_prompt = lambda request: PROMPT_IDS
        engine = Engine(EngineConfig(url=fake.url), memory.data_dir)
        await engine.start()
        await memory.policies.register_base("base")
        tool = Tool("look", "Look somewhere.", LOOK["function"]["parameters"], look)
        yield Agent(memory, HotSwap(memory.policies, engine), {}, AgentConfig(), tools=[tool])
        await engine.stop()
        await engine.client.close()


async def _live(tell: Tell, memory: Memory, agent: Agent, names: str, numbers: Iterator[int]) -> None:
    for number in numbers:
        name = f"{names}-{number}"
        closed = await play_one(agent, name)
        tell("closed", name, closed.id)
        await memory.trajectories.reward(closed.id, number % 2, RewardSource.USER, reason=name)
        tell("rewarded", name, closed.id)


async def play_one(agent: Agent, name: str) -> Trajectory:
    return await play(agent, messages=[{"role": "user", "content": name}])
