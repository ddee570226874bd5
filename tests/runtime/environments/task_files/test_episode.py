"""Tasks of a file, played through the rollout that serves users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memory.schema import Split, StepKind, TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, EnvironmentConfig
from runtime.environments.base import Environment
from runtime.environments.registry import open_environments
from runtime.serving.hotswap import HotSwap
from tests.runtime.fake_engine import FakeEngine, Reply, call, ids_of, say
from tests.support.rollouts import play

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ADD = {
    "name": "add",
    "split": "practice",
    "kind": "sums",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
    "grader": {"type": "numeric", "answer": 4},
}
PARIS = {
    "name": "paris",
    "split": "held-out",
    "messages": [{"role": "user", "content": "The weather in Paris and in Rome?"}],
    "tools": [WEATHER],
    "grader": {
        "type": "function_call",
        "calls": [{"weather": {"city": ["Paris"], "days": ["", 1]}}, {"weather": {"city": ["Rome"]}}],
    },
}
STOCK = {
    "name": "stock",
    "split": "practice",
    "messages": [{"role": "user", "content": "Which fruit is there most of?"}],
    "database": [
        {"name": "fruit", "columns": [{"name": "name"}, {"name": "number"}], "rows": [["fig", 2], ["kiwi", 9]]}
    ],
    "grader": {"type": "values", "answer": ["kiwi"]},
}


def write_tasks(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    tasks = write_tasks(tmp_path / "tasks.jsonl", ADD, PARIS, STOCK)
    return open_environments({"mine": EnvironmentConfig(tasks=tasks)}, tmp_path / "environments")["mine"]


@pytest.fixture
def agent(memory: Memory, hotswap: HotSwap, environment: Environment) -> Agent:
    return Agent(memory, hotswap, {"mine": environment}, AgentConfig(max_steps=6))


async def test_one_reply_ends_a_task_without_tools_and_is_graded(
    agent: Agent, memory: Memory, fake: FakeEngine, environment: Environment
):
    fake.script = say("It makes 4.")
    trajectory = await play(agent, environment.task("add"))
    assert (trajectory.stage, trajectory.answer, trajectory.kind) == ("finished", "It makes 4.", "sums")
    assert (trajectory.split, trajectory.environment, trajectory.task_text) == (
        Split.PRACTICE,
        "mine",
        "What is 2 + 2?",
    )
    assert fake.requests[0]["messages"] == [{"content": m["content"], "role": m["role"]} for m in ADD["messages"]]
    assert memory.trajectories.effective_reward(trajectory.id) == 1.0
    fake.script = say("It makes 5.")
    wrong = await play(agent, environment.task("add"))
    assert memory.trajectories.rewards(wrong.id)[0].reason == "expected 4, not 5"


async def test_calls_are_graded_in_any_order_and_none_of_them_runs(
    agent: Agent, memory: Memory, fake: FakeEngine, environment: Environment
):
    calls = [("weather", '{"city": "rome"}'), ("weather", '{"city": "Paris", "days": 1}')]
    fake.script = lambda request: Reply(calls=calls)
    trajectory = await play(agent, environment.task("paris"))
    assert [step.kind for step in memory.trajectories.steps(trajectory.id)] == [StepKind.MODEL]
    assert memory.trajectories.effective_reward(trajectory.id) == 1.0
    assert trajectory.answer == 'rome\nweather(city="Paris", days=1)'
    assert fake.requests[0]["tools"] == [WEATHER]
    (step,) = memory.trajectories.steps(trajectory.id)
    assert step.output_token_ids == ids_of("".join(name + arguments for name, arguments in calls))


async def test_calls_that_no_tool_could_take_are_counted_as_invalid(
    agent: Agent, memory: Memory, fake: FakeEngine, environment: Environment
):
    fake.script = lambda request: Reply(calls=[("weather", '{"city"'), ("forecast", "{}")])
    trajectory = await play(agent, environment.task("paris"))
    assert (trajectory.stage, trajectory.num_invalid_tool_calls) == ("finished", 2)
    assert memory.trajectories.effective_reward(trajectory.id) == 0.0
    fake.script = say("<tool_call>{broken</tool_call>")
    assert (await play(agent, environment.task("paris"))).num_invalid_tool_calls == 1


async def test_a_database_is_worked_on_over_many_turns_until_an_answer_is_submitted(
    agent: Agent, memory: Memory, fake: FakeEngine, environment: Environment
):
    def script(request: dict[str, Any]) -> Reply:
        if request["messages"][-1]["role"] == "user":
            return call("execute_sql", statement="SELECT name FROM fruit ORDER BY number DESC LIMIT 1")
        return call("submit_answer", values=[request["messages"][-1]["content"].split("'")[1]])

    fake.script = script
    trajectory = await play(agent, environment.task("stock"))
    kinds = [step.kind for step in memory.trajectories.steps(trajectory.id)]
    assert kinds == [StepKind.MODEL, StepKind.TOOL] * 2
    assert (trajectory.answer, memory.trajectories.effective_reward(trajectory.id)) == ('["kiwi"]', 1.0)


async def test_a_row_may_begin_in_the_middle_of_a_conversation(memory: Memory, hotswap: HotSwap, fake, tmp_path: Path):
    asked = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": "{}"}}]}
    heard = {"role": "tool", "tool_call_id": "c1", "content": "Rain."}
    messages = [{"role": "user", "content": "Oslo?"}, asked, heard]
    row = {**ADD, "name": "rain", "messages": messages, "grader": {"type": "contains", "answer": "rain"}}
    tasks = write_tasks(tmp_path / "tasks.jsonl", row)
    environment = open_environments({"mine": EnvironmentConfig(tasks=tasks, system_prompt="Hi.")}, tmp_path)["mine"]
    fake.script = say("It rains.")
    trajectory = await play(Agent(memory, hotswap, {"mine": environment}, AgentConfig()), environment.task("rain"))
    assert memory.trajectories.effective_reward(trajectory.id) == 1.0
    assert [message["role"] for message in fake.requests[0]["messages"]] == ["system", "user", "assistant", "tool"]
    assert trajectory.task_text == "Oslo?"


async def test_an_episode_without_an_answer_earns_nothing(
    agent: Agent, memory: Memory, fake: FakeEngine, environment: Environment
):
    fake.script = lambda request: call("execute_sql", statement="SELECT 1")
    trajectory = await play(agent, environment.task("stock"))
    assert trajectory.error == "BudgetExceeded: no answer within 6 steps"
    assert memory.trajectories.rewards(trajectory.id)[0].reason == "there was no answer"


async def test_a_file_that_changed_under_the_server_starts_no_task(
    agent: Agent, environment: Environment, tmp_path: Path
):
    write_tasks(tmp_path / "tasks.jsonl", {**ADD, "grader": {"type": "numeric", "answer": 5}}, PARIS, STOCK)
    trajectory = await play(agent, environment.task("add"))
    assert (trajectory.stage, trajectory.error) == (
        TrajectoryStage.FAILED,
        f"TaskChanged: {tmp_path / 'tasks.jsonl'}:1 has changed since the server read it: restart the server",
    )
