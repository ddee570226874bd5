"""`teach` against a running server and a scripted teacher: solved tasks are imported, and skipped the next time."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import serve
from memory.datasets.examples import Examples
from memory.formats.content import ExampleKind
from memory.schema import Task, Trust
from optimizer.data.examples import render_examples
from runtime.cli.output import run
from runtime.environments.base import Playthrough
from runtime.errors import EnvironmentRefused
from tests.optimizer.families import NAMES, make_tokenizer
from tests.runtime.api.worlds import Doors, ServedWorld
from tests.runtime.fake_engine import FakeEngine, Reply, call

KEY = "sk-secret-of-the-teacher"
COMMAND_LINE = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")


def open_left(request: dict) -> Reply:
    """Solve all tasks but those whose number ends with 3."""
    asked = next(message["content"] for message in request["messages"] if message["role"] == "user")
    return call("open", door="right" if asked.endswith("3") else "left")


class DoorsWithPages(Doors):
    """Doors whose tool returns untrusted text."""

    async def start(self, task: Task) -> Playthrough:
        playthrough = await super().start(task)
        playthrough.tools = [replace(tool, is_trusted=False) for tool in playthrough.tools]
        return playthrough


class DoorsThatStick(Doors):
    """Doors with one task that does not start."""

    async def start(self, task: Task) -> Playthrough:
        if task.name == "2":
            raise OSError("the door is stuck")
        return await super().start(task)


class NoDoors(Doors):
    """An environment that refuses to start."""

    async def start(self, task: Task) -> Playthrough:
        raise EnvironmentRefused("doors needs a house: build one")


@pytest.fixture
def teacher() -> Iterator[FakeEngine]:
    """A scripted endpoint in its own thread, because the command runs its own event loop."""
    engine = FakeEngine(open_left)
    engine.api_key = KEY
    started, loop = threading.Event(), asyncio.new_event_loop()
    ended = asyncio.Event()

    async def serve_until_ended() -> None:
        async with engine:
            started.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve_until_ended()), daemon=True)
    thread.start()
    assert started.wait(30)
    yield engine
    loop.call_soon_threadsafe(ended.set)
    thread.join(30)
    loop.close()


@pytest.fixture
def cli(
    world: ServedWorld, teacher: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> Callable:
    monkeypatch.delenv("RATCHET_KEY", raising=False)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    config = tmp_path / "ratchet.toml"
    config.write_text(
        '[environments.doors]\nclass = "tests.runtime.api.worlds:Doors"\n'
        f'[teacher]\nurl = "{teacher.url}/v1"\nmodel = "base"\napi_key = "TEACHER_KEY"\n'
        "max_cost = 5\nprompt_price = 1\noutput_price = 2\n"
    )

    def call_command(*arguments: str) -> tuple[int, dict]:
        options = ["--environment", "doors", "--url", world.url, "-c", str(config), "--json"]
        code = run(serve.app, ["teach", *options, *arguments])
        printed = capsys.readouterr().out
        assert KEY not in printed
        return code, json.loads(printed)

    return call_command


def replace_doors(config: Path, name: str) -> None:
    """Configure a class of this module in place of `Doors`."""
    text = config.read_text().replace("tests.runtime.api.worlds:Doors", f"tests.commands.test_teach_cli:{name}")
    config.write_text(text)


def learnable(examples: Examples) -> list[str | None]:
    taught = examples.learnable(ExampleKind.DEMONSTRATION, environments=["doors"], limit=100)
    return [each.example.task for each in taught]


def test_what_a_teacher_solves_is_learnable_and_skipped_the_next_time(world: ServedWorld, cli: Callable, teacher):
    code, taught = cli("--tasks", "5")
    assert (code, taught["num_solved"], taught["num_unsolved"], taught["num_added"]) == (0, 4, 1, 4)
    assert taught["teaches"] is True and taught["tokens_spent"] > 0 and taught["cost_left"] < 5
    assert sorted(filter(None, learnable(world.memory.examples))) == ["0", "1", "2", "4"]
    assert world.memory.examples.count() == [(ExampleKind.DEMONSTRATION, "doors", "teacher:base", 4)]
    example = world.memory.examples.select()[0]
    assert KEY not in json.dumps(example.model_dump(mode="json"))
    counts: Counter[str] = Counter()
    rows = world.memory.examples.learnable(ExampleKind.DEMONSTRATION, environments=["doors"], limit=100)
    rendered = render_examples(rows, make_tokenizer(NAMES[0]), 4096, counts)
    assert len(rendered) == 4 and not counts and all(sum(row.mask) for _, rows in rendered for row in rows)
    num_requests = len(teacher.requests)
    code, again = cli("--tasks", "6")
    assert (again["num_skipped"], again["num_solved"], again["num_unsolved"]) == (4, 1, 1)
    assert len(teacher.requests) == num_requests + 2
    asked = [message["content"] for request in teacher.requests for message in request["messages"]]
    assert not any(f"task {number}" in text for text in asked for number in range(50, 60))  # held-out tasks


def test_an_episode_that_read_untrusted_text_is_kept_and_never_learned(
    world: ServedWorld, cli: Callable, tmp_path: Path
):
    replace_doors(tmp_path / "ratchet.toml", "DoorsWithPages")
    code, taught = cli("--tasks", "2")
    assert (code, taught["num_solved"], taught["teaches"]) == (0, 2, False)
    assert [example.trust for example in world.memory.examples.select()] == [Trust.UNTRUSTED] * 2
    assert learnable(world.memory.examples) == []


def test_a_teacher_that_fails_ends_the_command_with_its_figures(cli: Callable, teacher: FakeEngine):
    teacher.api_key = "another"
    code, taught = cli("--tasks", "3", "--concurrency", "1")
    assert (code, taught["error_status"], taught["num_unplayed"]) == (1, 401, 3)
    assert "TEACHER_KEY" in taught["stopped_by"] and taught["tokens_spent"] == 0


def test_a_task_whose_environment_fails_is_named_and_the_others_are_taught(
    world: ServedWorld, cli: Callable, teacher: FakeEngine, tmp_path: Path, capsys
):
    config = tmp_path / "ratchet.toml"
    replace_doors(config, "DoorsThatStick")
    code, taught = cli("--tasks", "5")
    assert (code, taught["num_solved"], taught["num_unsolved"], taught["num_failed"]) == (0, 3, 1, 1)
    assert taught["failures"] == ["'2': OSError: the door is stuck"] and taught["stopped_by"] is None
    command = ["teach", "--environment", "doors", "--url", world.url, "-c", str(config), "--tasks", "5"]
    assert run(serve.app, command) == 0
    printed = capsys.readouterr().out
    assert "solved 0 of 2 tasks played (1 of them failed)" in printed
    assert "failed: '2': OSError: the door is stuck" in printed


def test_an_environment_that_can_start_no_task_ends_the_command_with_its_figures(
    cli: Callable, teacher: FakeEngine, tmp_path: Path
):
    replace_doors(tmp_path / "ratchet.toml", "NoDoors")
    code, taught = cli("--tasks", "3")
    assert (code, taught["num_unplayed"], taught["num_failed"], taught["tokens_spent"]) == (1, 3, 0, 0)
    assert taught["stopped_by"] == "doors needs a house: build one" and teacher.requests == []


def test_a_key_given_instead_of_its_variable_is_not_printed(cli: Callable, teacher: FakeEngine):
    code, failed = cli("--teacher.api_key", "sk-pasted")
    message = failed["error"]["message"]
    assert code == 2 and "never the key itself" in message and "sk-pasted" not in message
    code, failed = cli("--teacher.api_key", "NO_SUCH_KEY")
    assert code == 2 and "'NO_SUCH_KEY'" in failed["error"]["message"] and teacher.requests == []


def test_a_missing_teacher_is_named(cli: Callable):
    code, failed = cli("--teacher.model", "none")
    assert code == 2 and "teacher.model is not set" in failed["error"]["message"]


def test_the_settings_of_a_teacher_in_the_documents_are_valid(tmp_path: Path):
    (text,) = re.findall(r"^```toml\n(.*?)^```", COMMAND_LINE, re.MULTILINE | re.DOTALL)
    (tmp_path / "ratchet.toml").write_text(text)
    shown = serve.read_all_settings(tmp_path / "ratchet.toml", {}, []).teacher
    assert shown.model is not None and shown.max_cost is not None
