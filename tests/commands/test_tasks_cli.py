"""The commands `tasks make` and `tasks check`, and task files on a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

import serve
from memory.schema import Task
from runtime.api.services import Services
from runtime.cli.output import run
from runtime.config import EnvironmentConfig
from runtime.engine.client import Message
from runtime.environments.base import Environment, Playthrough
from runtime.environments.registry import open_environments
from runtime.errors import EnvironmentRefused, ToolError
from tests.runtime.api.playing import PlayedWorld
from tests.runtime.api.worlds import Doors
from tests.runtime.fake_engine import Reply

SUM = {"messages": [{"role": "user", "content": "2 + 2?"}], "grader": {"type": "numeric", "answer": 4}}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    code = run(serve.app, [*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_make_writes_a_task_file_that_check_accepts(tmp_path: Path, capsys):
    write(tmp_path / "train.jsonl", {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"})
    out = tmp_path / "gsm8k.jsonl"
    assert call(capsys, "tasks", "make", "gsm8k", tmp_path, out) == (
        0,
        {"path": str(out), "num_tasks": 1, "splits": {"practice": 1}, "kinds": {"arithmetic": 1}, "left_out": []},
    )
    code, checked = call(capsys, "tasks", "check", out)
    assert (code, checked["graders"], checked["num_demonstrations"]) == (0, {"numeric": 1}, 1)
    code, failed = call(capsys, "tasks", "make", "gsm9k", tmp_path, out)
    assert code == 1 and "no benchmark is called 'gsm9k'" in failed["error"]["message"]


def test_check_names_bad_rows_and_wrong_demonstrations(tmp_path: Path, capsys):
    wrong = {"name": "a", **SUM, "demonstration": [{"role": "assistant", "content": "5"}]}
    code, checked = call(capsys, "tasks", "check", write(tmp_path / "t.jsonl", wrong))
    assert (code, checked["problems"]) == (
        1,
        [f"{tmp_path}/t.jsonl:1: the demonstration of task 'a': expected 4, not 5"],
    )
    code, failed = call(capsys, "tasks", "check", write(tmp_path / "t.jsonl", wrong, {"name": "b"}))
    assert code == 1 and f"{tmp_path}/t.jsonl:2: messages: Field required" in failed["error"]["message"]


def test_check_prints_a_warning_and_succeeds(tmp_path: Path, capsys):
    rows = [{"name": f"t{n}", "split": "practice", "kind": "sums" if n < 90 else "dates", **SUM} for n in range(120)]
    assert run(serve.app, ["tasks", "check", str(write(tmp_path / "t.jsonl", *rows))]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the first 24 of 120 practice tasks have none of the kinds dates: tasks are taken" in printed


def test_check_knows_the_functions_of_the_configuration(tmp_path: Path, capsys, monkeypatch):
    rule = {"type": "function", "name": "long", "answer": 3}
    row = {"name": "a", **SUM, "grader": rule, "demonstration": [{"role": "assistant", "content": "four"}]}
    write(tmp_path / "t.jsonl", row)
    function = "tests.runtime.environments.test_registry:is_long"
    toml = f'[environments.mine]\ntasks = "t.jsonl"\nfunctions = {{ long = "{function}" }}\n'
    (tmp_path / "c.toml").write_text(toml)
    monkeypatch.chdir(tmp_path)
    code, checked = call(capsys, "tasks", "check", "t.jsonl", "-c", "c.toml")
    assert (code, checked["problems"]) == (0, [])
    code, failed = call(capsys, "tasks", "check", "t.jsonl")
    assert code == 1 and "the function 'long' is not configured (there is: none)" in failed["error"]["message"]


def test_demonstrations_of_practice_tasks_become_rows_that_name_their_tasks(tmp_path: Path, capsys, monkeypatch):
    answer = [{"role": "assistant", "content": "4"}]
    rows = [
        {"name": "a", "split": "practice", **SUM, "demonstration": answer},
        {"name": "b", "split": "held-out", **SUM, "demonstration": answer},
        {"name": "c", "split": "practice", **SUM},
    ]
    write(tmp_path / "t.jsonl", *rows)
    (tmp_path / "ratchet.toml").write_text('[environments.mine]\ntasks = "t.jsonl"\nsystem_prompt = "Add."\n')
    monkeypatch.chdir(tmp_path)
    code, written = call(capsys, "tasks", "demonstrations", "mine", "out.jsonl")
    assert (code, written["num_written"]) == (0, 1)
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (row["kind"], row["task"]) == ("demonstration", "a")
    assert [(message["role"], message["content"]) for message in row["completion"]] == [
        ("system", "Add."),
        ("user", "2 + 2?"),
        ("assistant", "4"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "ratchet.toml", "t.jsonl"]
    write(tmp_path / "t.jsonl", *rows[1:])
    code, failed = call(capsys, "tasks", "demonstrations", "mine", "out.jsonl")
    assert code == 1 and failed["error"]["message"] == "no practice task of 'mine' has a demonstration"
    code, failed = call(capsys, "tasks", "demonstrations", "yours", "out.jsonl")
    assert code == 1 and "no environment is called 'yours'; there is: textworld" in failed["error"]["message"]


class ShownDoors(Doors):
    """Doors whose practice tasks have demonstrations; one demonstration fails, and one task does not start."""

    torn, stuck = ("1",), ("2",)

    async def demonstrate(self, task: Task) -> list[Message] | None:
        if task.name in self.torn:
            raise OSError("the page is\ntorn")
        return [{"role": "user", "content": "Open a door."}, {"role": "assistant", "content": "Left."}]

    async def start(self, task: Task) -> Playthrough:
        if task.name in self.stuck:
            raise ToolError("the door is stuck")
        return await super().start(task)


class ShutDoors(ShownDoors):
    """Doors whose tasks all fail to start."""

    torn, stuck = (), tuple(map(str, range(50)))


class NoDoors(ShownDoors):
    """An environment that refuses to start."""

    async def start(self, task: Task) -> Playthrough:
        raise EnvironmentRefused("doors needs a house: build one")


def test_a_task_that_fails_is_left_out_of_the_demonstrations_and_named(tmp_path: Path, capsys, monkeypatch):
    def configure(name: str) -> None:
        (tmp_path / "ratchet.toml").write_text(
            f'[environments.doors]\nclass = "tests.commands.test_tasks_cli:{name}"\n'
        )

    monkeypatch.chdir(tmp_path)
    configure("ShownDoors")
    command = ("tasks", "demonstrations", "doors", "out.jsonl", "--limit", "5")
    failures = ["'1': OSError: the page is torn", "'2': ToolError: the door is stuck"]
    assert call(capsys, *command) == (0, {"path": "out.jsonl", "num_written": 3, "failures": failures})
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    assert run(serve.app, list(command)) == 0
    assert [f"left out: {failure}" for failure in failures] == capsys.readouterr().out.splitlines()[1:]
    configure("ShutDoors")
    code, failed = call(capsys, *command)
    assert code == 1 and failed["error"]["message"] == (
        "no practice task of 'doors' has a demonstration; 5 failed, the first is '0': ToolError: the door is stuck"
    )
    configure("NoDoors")
    code, failed = call(capsys, *command)
    assert code == 1 and failed["error"]["message"] == "doors needs a house: build one"


def test_play_plays_a_task_file_through_the_server(tmp_path: Path, capsys):
    rows = [{"name": f"t{n}", "split": "held-out", **SUM} for n in range(3)]
    rows[2]["grader"] = {"type": "numeric", "answer": 5}
    path = write(tmp_path / "t.jsonl", *rows)
    environments = open_environments({"mine": EnvironmentConfig(tasks=path, system_prompt="Add.")}, tmp_path)

    def offer(services: Services) -> None:
        cast("dict[str, Environment]", services.environments).update(environments)  # shared with the agent

    with PlayedWorld(tmp_path / "data", lambda request: Reply("4"), change=offer) as world:
        code, played = call(capsys, "play", "--environment", "mine", "--url", world.url)
        assert (code, played["num_tasks"], played["num_successes"]) == (0, 3, 2)
        assert [episode["task"] for episode in played["episodes"] if not episode["success"]] == ["t2"]
        code, failed = call(capsys, "play", "--environment", "mine", "--split", "practice", "--url", world.url)
        assert code == 2 and failed["error"]["message"] == "mine has no task of the split 'practice'"
        assert world.fake.requests[0]["messages"][0] == {"role": "system", "content": "Add."}
