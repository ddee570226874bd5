"""Rehearsals: a tool with side effects answers from recorded results, and never acts."""

from __future__ import annotations

from functools import partial

import pytest

from memory.schema import Split, StepKind, Task
from memory.store import Memory
from optimizer.evaluation.cells import Cell, play_cell
from runtime.agent.graph import Agent
from runtime.environments.base import Environment, Outcome, Playthrough
from runtime.errors import UnknownTask
from runtime.serving.hotswap import HotSwap
from runtime.tools.base import Tool
from runtime.tools.functions import tool_from_function
from tests.runtime.fake_engine import FakeEngine, Reply, call
from tests.support.rollouts import play

ASK = [{"role": "user", "content": "Order tea."}]


class Shop(Environment):
    """An environment whose tasks use the server's own tools, one with side effects and one without."""

    name = "shop"
    system_prompt = "You order."

    def __init__(self) -> None:
        self.orders: list[str] = []
        self.tools = [tool_from_function(self.send_order, has_side_effects=True), tool_from_function(self.price)]

    def send_order(self, article: str, number: int = 1) -> str:
        """Order an article, for real."""
        if article == "gold":
            raise ValueError("sold out")
        self.orders.append(article)
        return f"order {len(self.orders)}: {number} x {article}"

    def price(self, article: str) -> str:
        """Say what an article costs."""
        return "3"

    def task(self, name: str) -> Task:
        raise UnknownTask(name)

    def tasks(self, split: Split, num_tasks: int, *, offset: int = 0) -> list[Task]:
        return [Task("shop", str(number), "ordering", split) for number in range(offset, offset + num_tasks)]

    async def start(self, task: Task) -> Playthrough:
        return Counter(task, self.tools)


class Counter(Playthrough):
    def __init__(self, task: Task, tools: list[Tool]) -> None:
        self.task, self.task_text, self.tools = task, "Order tea.", tools

    async def close(self) -> Outcome:
        return Outcome(1.0, "polite")


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def agent(memory: Memory, hotswap: HotSwap, shop: Shop) -> Agent:
    return Agent(memory, hotswap, {"shop": shop}, tools=shop.tools)


def calling(name: str, **arguments: object):
    """A policy that calls once, and then repeats the result."""

    def script(request):
        last = request["messages"][-1]
        return Reply(last["content"]) if last["role"] == "tool" else call(name, **arguments)

    return script


async def test_a_gate_never_sends_a_real_order(agent: Agent, shop: Shop, fake: FakeEngine, memory: Memory):
    fake.script = calling("send_order", article="tea", number=2)
    await play(agent, messages=ASK, is_shared=True)
    assert shop.orders == ["tea"]

    for split in (Split.HELD_OUT, Split.PRACTICE):
        played = await play_cell(
            Cell("base", policy=0, use_memory=False),
            shop.tasks(split, 3),
            rollout=partial(play, agent),
            grade=memory.trajectories.effective_reward,
            count_model_calls=memory.trajectories.count_model_calls,
            success_reward=1.0,
            concurrency=3,
        )
        answers = {memory.trajectories.get(episode.trajectory_id).answer for episode in played.played}
        assert answers == {"order 1: 2 x tea"}
    assert shop.orders == ["tea"]


async def test_without_a_record_for_the_same_arguments_it_is_not_available(
    agent: Agent, shop: Shop, fake: FakeEngine, memory: Memory
):
    fake.script = calling("send_order", article="tea")
    await play(agent, messages=ASK, is_shared=True)
    fake.script = calling("send_order", article="coffee")
    trajectory = await play(agent, shop.tasks(Split.HELD_OUT, 1)[0])
    (step,) = [step for step in memory.trajectories.steps(trajectory.id) if step.kind is StepKind.TOOL]
    assert step.error.startswith("'send_order' is not available here: it acts on the outside")
    assert (trajectory.num_invalid_tool_calls, shop.orders) == (0, ["tea"])


async def test_the_record_is_found_by_the_arguments_meaning_and_the_newest_counts(
    agent: Agent, shop: Shop, fake: FakeEngine
):
    for number in (1, 2):
        fake.script = calling("send_order", article="tea", number=1)
        await play(agent, messages=ASK, is_shared=True)
        assert len(shop.orders) == number
    fake.script = calling("send_order", number=1, article="tea")
    assert (await play(agent, shop.tasks(Split.HELD_OUT, 1)[0])).answer == "order 2: 1 x tea"


async def test_calls_of_one_episode_are_told_apart_though_their_ids_are_the_same(
    agent: Agent, shop: Shop, fake: FakeEngine, memory: Memory
):
    articles = iter(["tea", "coffee"])

    def script(request):
        fake.num_calls = 0  # an engine whose ids start again
        article = next(articles, None)
        return call("send_order", article=article) if article else Reply("done")

    fake.script = script
    trajectory = await play(agent, messages=ASK, is_shared=True)
    steps = memory.trajectories.steps(trajectory.id)
    assert len({step.tool_call_id for step in steps if step.kind is StepKind.TOOL}) == 1
    assert memory.trajectories.recorded_result("send_order", {"article": "tea"}) == "order 1: 1 x tea"
    assert memory.trajectories.recorded_result("send_order", {"article": "coffee"}) == "order 2: 1 x coffee"


async def test_what_a_tool_yielded_for_one_person_is_no_record_for_another(
    agent: Agent, fake: FakeEngine, memory: Memory
):
    fake.script = calling("send_order", article="tea")
    await play(agent, messages=ASK, user_id="jane")
    found = {it: memory.trajectories.recorded_result("send_order", {"article": "tea"}, user_id=it) for it in "jb"}
    assert found == {"j": None, "b": None}
    assert memory.trajectories.recorded_result("send_order", {"article": "tea"}, user_id="jane") == "order 1: 1 x tea"
    assert memory.trajectories.recorded_result("send_order", {"article": "tea"}) is None


async def test_what_a_retired_episode_was_told_is_no_record(agent: Agent, fake: FakeEngine, memory: Memory):
    fake.script = calling("send_order", article="tea")
    told = await play(agent, messages=ASK, is_shared=True)
    assert memory.trajectories.recorded_result("send_order", {"article": "tea"}) == "order 1: 1 x tea"
    await memory.reviews.retire_exemplar(told.id, tenant="")
    assert memory.trajectories.recorded_result("send_order", {"article": "tea"}) is None


async def test_errors_and_rehearsals_are_no_record(agent: Agent, shop: Shop, fake: FakeEngine, memory: Memory):
    fake.script = calling("send_order", article="gold")
    failed = await play(agent, messages=ASK, is_shared=True)
    assert "sold out" in failed.answer
    assert "not available" in (await play(agent, shop.tasks(Split.HELD_OUT, 1)[0])).answer
    assert memory.trajectories.recorded_result("send_order", {"article": "gold"}) is None


async def test_a_malformed_call_is_malformed_in_a_rehearsal_too(agent: Agent, shop: Shop, fake: FakeEngine):
    fake.script = calling("send_order", article=7)
    trajectory = await play(agent, shop.tasks(Split.HELD_OUT, 1)[0])
    assert trajectory.num_invalid_tool_calls == 1


async def test_a_tool_without_side_effects_runs_in_a_rehearsal(agent: Agent, shop: Shop, fake: FakeEngine):
    fake.script = calling("price", article="tea")
    assert (await play(agent, shop.tasks(Split.HELD_OUT, 1)[0])).answer == "3"
