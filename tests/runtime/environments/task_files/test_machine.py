"""Tasks with a machine, played through the rollout that serves users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memory.schema import StepKind, TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.agent.turn import TurnRequest
from runtime.config import AgentConfig, EnvironmentConfig
from runtime.environments.machines import machine as machines
from runtime.environments.registry import open_environments
from runtime.environments.task_files.check import check_task_file
from runtime.environments.task_files.machine import describe_output
from runtime.errors import EnvironmentRefused, ToolRefused
from runtime.serving.hotswap import HotSwap
from tests.runtime.fake_engine import FakeEngine, Reply, call, say
from tests.support.machines import needs_machine
from tests.support.rollouts import play

COUNT = {
    "name": "count",
    "split": "practice",
    "messages": [{"role": "user", "content": "How many files are in /srv?"}],
    "machine": {"setup": [{"code": "touch /srv/a /srv/b"}], "start": "cd /srv"},
    "grader": {"type": "checks", "checks": [{"run": {"code": "ls /srv | wc -l"}}, {"compare": "integer"}]},
}
MAKE = {
    "name": "make",
    "split": "held-out",
    "messages": [{"role": "user", "content": "Make the directory /data."}],
    "machine": {},
    "grader": {"type": "checks", "checks": [{"run": {"code": "test -d /data"}}]},
}
RESULT = "The output of the OS:\n\n"


def write_tasks(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def open_agent(memory: Memory, hotswap: HotSwap, tmp_path: Path, *rows: dict[str, Any]) -> Agent:
    tasks = write_tasks(tmp_path / "tasks.jsonl", *rows)
    environments = open_environments({"os": EnvironmentConfig(tasks=tasks)}, tmp_path / "environments")
    return Agent(memory, hotswap, environments, AgentConfig(max_steps=8))


def replies(*each: Reply) -> Any:
    left = iter(each)
    return lambda request: next(left)


@needs_machine
async def test_a_task_is_worked_on_with_bash_until_it_is_answered(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, tmp_path: Path
):
    agent = open_agent(memory, hotswap, tmp_path, COUNT, MAKE)
    fake.script = replies(call("bash", command="pwd; cd /"), call("bash", command="pwd"), call("answer", answer="2"))
    trajectory = await play(agent, agent.environment("os").task("count"))
    steps = memory.trajectories.steps(trajectory.id)
    assert [step.kind for step in steps] == [StepKind.MODEL, StepKind.TOOL] * 3
    assert [step.content for step in steps if step.kind == StepKind.TOOL] == [f"{RESULT}/srv\n", f"{RESULT}/\n", "2"]
    assert (trajectory.answer, memory.trajectories.effective_reward(trajectory.id)) == ("2", 1.0)
    assert [tool["function"]["name"] for tool in fake.requests[0]["tools"]] == ["bash", "answer", "finish"]


@needs_machine
async def test_what_was_done_counts_where_no_answer_is_asked_for(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, tmp_path: Path
):
    agent = open_agent(memory, hotswap, tmp_path, COUNT, MAKE)
    fake.script = replies(call("bash", command="mkdir /data"), call("finish"))
    done = await play(agent, agent.environment("os").task("make"))
    fake.script = replies(call("finish"))
    undone = await play(agent, agent.environment("os").task("make"))
    fake.script = replies(call("finish"))
    unanswered = await play(agent, agent.environment("os").task("count"))
    fake.script = say("<think>1?</think>2")
    spoken = await play(agent, agent.environment("os").task("count"))
    rewards = [memory.trajectories.effective_reward(it.id) for it in (done, undone, unanswered, spoken)]
    assert rewards == [1.0, 0.0, 0.0, 1.0]


@needs_machine
async def test_an_episode_that_runs_out_of_steps_earns_nothing_and_its_machine_ends(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    closed = []
    close = machines.Machine.close

    async def note(self: machines.Machine) -> None:
        closed.append(self)
        await close(self)

    monkeypatch.setattr(machines.Machine, "close", note)
    agent = open_agent(memory, hotswap, tmp_path, COUNT)
    fake.script = lambda request: call("bash", command="ls")
    trajectory = await play(agent, agent.environment("os").task("count"))
    assert memory.trajectories.rewards(trajectory.id)[0].reason == "there was no answer"
    assert trajectory.error == "BudgetExceeded: no answer within 8 steps" and len(closed) == 1


@needs_machine
async def test_a_setup_that_fails_rewards_nobody(memory: Memory, hotswap: HotSwap, fake: FakeEngine, tmp_path: Path):
    broken = {**COUNT, "machine": {"setup": [{"code": "echo no such user >&2; exit 3"}]}}
    agent = open_agent(memory, hotswap, tmp_path, broken)
    turn = await agent.rollout(TurnRequest(task=agent.environment("os").task("count")))
    assert (turn.trajectory.stage, turn.reward) == (TrajectoryStage.FAILED, None)
    assert turn.trajectory.error is not None
    assert "the machine's setup ended with status 3: no such user" in turn.trajectory.error


@needs_machine
async def test_check_plays_demonstrations_in_machines(tmp_path: Path):
    def calls(name: str, **arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}

    seen = {"role": "tool", "tool_call_id": "c", "content": ""}
    right = {**MAKE, "demonstration": [calls("bash", command="mkdir /data"), seen, calls("finish")]}
    wrong = {**COUNT, "demonstration": [calls("answer", answer="3")]}
    checked = await check_task_file(write_tasks(tmp_path / "t.jsonl", right, wrong))
    assert checked.num_demonstrations == 2
    assert checked.problems == [
        f"{tmp_path}/t.jsonl:2: the demonstration of task 'count': expected '2' (integer), not '3'"
    ]


def test_output_is_cut_as_agentbench_cuts_it():
    assert describe_output("") == "The output of the OS is empty."
    assert describe_output("x" * 800) == RESULT + "x" * 800
    assert describe_output("x" * 801) == RESULT + "x" * 780 + "\n[truncated because the output is too long]"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"machine": None}, "the grader 'checks' needs a machine"),
        ({"tools": [{"function": {"name": "f"}}]}, "a row with a machine brings its tools"),
        ({"database": [{"name": "t", "columns": [{"name": "a"}]}]}, "a database or a machine, not both"),
        ({"machine": {"setups": []}}, "machine.setups: Extra inputs are not permitted"),
        ({"machine": {"setup": [{"code": "x", "language": "perl"}]}}, "Input should be 'bash' or 'python'"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(change: dict[str, Any], problem: str, tmp_path: Path):
    tasks = write_tasks(tmp_path / "tasks.jsonl", {"name": "a", **{**MAKE, "name": "a"}}, {**COUNT, **change})
    with pytest.raises(EnvironmentRefused, match=rf"(?s)tasks.jsonl:2: .*{problem}"):
        open_environments({"os": EnvironmentConfig(tasks=tasks)}, tmp_path)


def test_without_bubblewrap_the_file_is_refused_and_the_package_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machines, "PYTHON", "/bin/sh")

    def refuse() -> str:
        raise ToolRefused(
            "the tool 'run_python' needs bubblewrap: install it (apt install bubblewrap), or set tools.python = false"
        )

    monkeypatch.setattr(machines, "find_bwrap", refuse)
    tasks = write_tasks(tmp_path / "tasks.jsonl", MAKE)
    with pytest.raises(EnvironmentRefused, match=r"tasks.jsonl:1: .*a task's machine needs bubblewrap.*apt install"):
        open_environments({"os": EnvironmentConfig(tasks=tasks)}, tmp_path)
