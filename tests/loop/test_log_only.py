"""A LangGraph agent that knows the server only by its `base_url` improves by its log and its author's feedback.

The learner cannot play: its seams to rollouts and tasks raise. The engine and the trainer are fakes, as in
test_loop.py; the clients, the socket, the graph, the rows, the gate and the swap are real. With the real engine:
`python -m tests.bench.log_only`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import before_model
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI

from memory.schema import PolicyStage, Split
from optimizer.config import OptimizerConfig
from optimizer.seams import Seams
from runtime.cli.cycles import PLAY_NOTHING
from runtime.engine.model_families import POCKET_MODEL
from runtime.environments.textworld import TextWorld
from tests.bench.log_only import load_app
from tests.loop.test_loop import FOODS, Cook, QuickTrainer
from tests.optimizer.worlds import ACT
from tests.runtime.api.playing import PlayedWorld
from tests.runtime.fake_engine import call
from tests.support.learners import make_learner

SETTINGS = OptimizerConfig.model_validate(
    {
        **PLAY_NOTHING,
        "demonstrations": {"min_rows": 4},
        "preferences": {"min_rows": 4},
        "evaluation": {"num_tasks": 16, "min_tasks": 16},
    }
)
PRACTICE, HELD_OUT = range(8), range(500, 516)
LUCKY, UNLUCKY = 1, 0


async def cannot_play(*asked: Any, **how: Any) -> Any:
    raise AssertionError("there is nothing here that could be played")


@dataclass
class Author:
    """The app and its author."""

    url: str
    connections: httpx.AsyncClient
    http: httpx.AsyncClient

    async def cook(self, meal: int, *, metadata: dict[str, str] | None = None, **how: Any) -> tuple[str, bool]:
        """Let the app make a meal; return the last answer's id, and whether the meal is good."""
        said: list[str] = []

        async def act(command: str) -> str:
            food = FOODS[meal % len(FOODS)]
            if command == "read cookbook":
                return f"Directions:\nfry the {food}"
            said.append(command)
            return "It is done."

        @before_model(can_jump_to=["end"])
        def stop_when_done(state: Any, runtime: Any) -> dict[str, Any] | None:
            return {"jump_to": "end"} if said else None

        model = ChatOpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            http_async_client=self.connections,
            extra_body={"metadata": {"share": "true", **(metadata or {})}},
            **how,
        )
        tool = StructuredTool(
            name="act", description="Do one thing.", args_schema=ACT["function"]["parameters"], coroutine=act
        )
        agent = create_agent(model, [tool], system_prompt="You cook.", middleware=[stop_when_done])
        ended = await agent.ainvoke({"messages": [("user", f"Make meal {meal}.")]})
        last = [message for message in ended["messages"] if message.type == "ai"][-1]
        return last.response_metadata["id"], said[0].endswith("with stove")

    async def reward(self, answer: str, is_good: bool) -> None:
        for path, body in (
            ("/v1/feedback", {"target": answer, "value": is_good}),
            (f"/v1/trajectories/{answer}/close", None),
        ):
            (await self.http.post(path, json=body)).raise_for_status()

    async def practise(self) -> None:
        """Cook every practice meal twice as an ordinary client, once with a lucky seed, and reward it."""
        for seed in (LUCKY, UNLUCKY):
            for meal in PRACTICE:
                await self.reward(*await self.cook(meal, model="agent", temperature=1.0, seed=seed))

    async def measure(self, policy: str) -> int:
        """Cook the held-out meals with one policy; return how many are good."""
        tried = await asyncio.gather(
            *(
                self.cook(
                    meal,
                    model=f"agent@{policy}",
                    temperature=0.0,
                    metadata={"task": str(meal), "split": "held-out"},
                )
                for meal in HELD_OUT
            )
        )
        for answer, is_good in tried:
            await self.reward(answer, is_good)
        return sum(is_good for _, is_good in tried)

    async def learn(self) -> dict[str, Any]:
        cycle = (await self.http.post("/v1/cycles", json={})).raise_for_status().json()
        while cycle["status"] == "running":
            await asyncio.sleep(0.02)
            cycle = (await self.http.get(f"/v1/cycles/{cycle['id']}")).json()
        return cycle

    async def judge(self, policy: str) -> httpx.Response:
        return await self.http.post(f"/v1/policies/{policy}/judge")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PlayedWorld]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POCKET_MODEL)
    world = PlayedWorld(tmp_path / "data", base_model=str(POCKET_MODEL))
    world.fake = Cook(tokenizer)
    seams = Seams(rollout=cannot_play, tasks=cannot_play, prepare=cannot_play, train=QuickTrainer(tokenizer))
    world.learner = make_learner(world.memory, SETTINGS, seams)
    with world:
        yield world


@pytest.fixture
async def author(world: PlayedWorld) -> AsyncIterator[Author]:
    async with (
        openai.DefaultAsyncHttpxClient() as connections,
        httpx.AsyncClient(base_url=world.url, trust_env=False, timeout=30) as http,
    ):
        yield Author(world.url, connections, http)


async def test_an_agent_gets_better_by_its_base_url_alone(world: PlayedWorld, author: Author) -> None:
    memory = world.memory
    await author.practise()
    cycle = await author.learn()

    assert (cycle["status"], cycle["error"]) == ("completed", None)
    assert cycle["verdict"]["decision"] == "uninformative"
    assert cycle["verdict"]["reason"].startswith("0 tasks were played by both")
    num_tasks = [cycle["artifacts"][rows]["num_tasks"] for rows in ("demonstrations", "preferences")]
    assert num_tasks == [8, 4]  # with the first wins in memory, the base won the even meals in the second round as well
    assert [it.text for it in memory.insights.active("")] == ["fry the _ -> cook _ with stove"]
    candidate = memory.policies.get(cycle["artifacts"]["candidate"])
    assert candidate.stage is PolicyStage.CANDIDATE and memory.policies.active().version == 0

    assert await author.measure("v0") < len(HELD_OUT) == await author.measure(candidate.name)
    judged = (await author.judge(candidate.name)).json()

    assert (judged["decision"], judged["active"]) == ("promote", candidate.name), judged["reason"]
    assert memory.policies.active().verdict["paired"]["num_tasks"] == len(HELD_OUT)
    metrics = (await author.http.get("/metrics")).text
    for decision in ("promote", "uninformative"):
        assert f'ratchet_gate_decisions_total{{decision="{decision}"}} 1.0' in metrics
    report = await author.http.get(f"/v1/cycles/{cycle['id']}/report", params={"format": "markdown"})
    assert "as clients played and rewarded them: better on the same tasks" in report.text
    _, is_good = await author.cook(PRACTICE[1], model="agent", temperature=0.0)
    assert is_good

    held_out = memory.trajectories.select(split=Split.HELD_OUT, limit=1000)
    assert len(held_out) == 2 * len(HELD_OUT)
    assert not {view.trajectory.id for view in held_out} & {it.trajectory.id for it in memory.trajectories.learnable()}


async def test_a_candidate_that_is_worse_is_rejected_and_the_same_tasks_do_not_decide_again(
    world: PlayedWorld, author: Author
) -> None:
    world.learner._seams.train.planted = "oven"
    await author.practise()
    candidate = f"v{(await author.learn())['artifacts']['candidate']}"
    await author.measure("v0")
    early = (await author.judge(candidate)).json()
    assert early["decision"] == "uninformative" and f"have {candidate} and v0 play" in early["reason"]

    await author.measure(candidate)
    judged = (await author.judge(candidate)).json()
    assert (judged["decision"], judged["active"]) == ("reject", "v0")
    assert world.memory.policies.get(candidate).stage is PolicyStage.REJECTED

    await author.measure(candidate)  # the same tasks again
    again = (await author.judge(candidate)).json()

    assert again["decision"] == "uninformative" and again["reason"].startswith("0 tasks were played by both")
    assert world.memory.policies.get(candidate).stage is PolicyStage.REJECTED


async def test_the_app_in_the_documents_plays_as_it_stands(tmp_path: Path) -> None:
    environment = TextWorld(tmp_path)
    task = environment.task("500000")
    played_here = await environment.start(task)
    with PlayedWorld(tmp_path / "data", lambda request: call("act", command="look")) as world:
        async with openai.DefaultAsyncHttpxClient() as connections:
            url, only_this = f"{world.url}/v1", {"max_retries": 0, "http_async_client": connections}
            model = ChatOpenAI(model="agent", base_url=url, api_key="none", **only_this)
            ended = await load_app().play(tmp_path / "cooking-500000.z8", model)
        asked = world.fake.requests[-1]

    # The pocket model knows only this wording and this tool, so the app's must be identical.
    assert asked["messages"][1]["content"] == played_here.task_text
    assert asked["tools"] == [tool.definition() for tool in played_here.tools]
    looked = await played_here.tools[0].call({"command": "look"})
    heard = [message.content for message in ended.messages if message.type == "tool"]
    assert heard == [looked] * 24 and not ended.is_won
    await played_here.close()
