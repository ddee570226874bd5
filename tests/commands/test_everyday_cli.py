"""Everyday commands against a running server: chat, documents, feedback, cycles, reports; and the output's style."""

from __future__ import annotations

import asyncio
import io
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from typer.main import get_command

import serve
from runtime.cli import render as show
from runtime.cli.output import run
from runtime.cli.printable import printable, printable_json
from runtime.cli.render import render_banner
from tests.runtime.api.worlds import ServedWorld

ESCAPES = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e[red]late[/red]\r\x08"
"""Sets the window's title, clears the screen, colours, reverses the text's direction, overwrites the line."""


class Terminal(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def cli(world: ServedWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("RATCHET_KEY", raising=False)

    def call(*arguments: str, said: io.StringIO | None = None) -> tuple[int, str]:
        if said is not None:
            monkeypatch.setattr(sys, "stdin", said)
        code = run(serve.app, [*arguments, "--url", world.url])
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def as_json(cli: Callable) -> Callable:
    def call(*arguments: str, said: io.StringIO | None = None) -> tuple[int, dict]:
        code, out = cli(*arguments, "--json", said=said)
        assert out.count("\n") == 1, "one JSON object, on one line, and nothing else"
        return code, json.loads(out)

    return call


# chat


def test_one_question_is_answered_from_the_argument_or_from_standard_input(cli, as_json) -> None:
    assert cli("chat", "hello there") == (0, "You said: hello there\n")
    assert cli("chat", said=io.StringIO("from a pipe\n")) == (0, "You said: from a pipe\n\n")
    code, answer = as_json("chat", "hello there", "--policy", "v0")
    assert code == 0 and answer["answer"] == "You said: hello there"
    assert answer["id"] == answer["trajectory_id"] and answer["policy"] == "v0"


def test_a_conversation_goes_on_and_takes_what_is_thought_of_it(world: ServedWorld, cli) -> None:
    lines = ["/good", "my name is Ann", "what is it?", "/correct It is Ann.", "/new", "and now?", "/nonsense", ""]
    code, out = cli("chat", "--user", "ann", said=Terminal("\n".join(lines)))

    assert code == 0
    assert "there is no answer yet" in out and "no command '/nonsense'" in out and "noted" in out
    asked = [[message["content"] for message in call["messages"]] for call in world.engine.calls]
    assert asked[1][-3:] == ["my name is Ann", "You said: my name is Ann", "what is it?"]
    assert asked[2] == ["and now?"]
    views = world.memory.trajectories.select()
    assert {view.trajectory.user_id for view in views} == {"ann"}
    corrected = next(view for view in views if view.trajectory.task_text == "what is it?")
    (kept,) = world.memory.feedback.select(corrected.trajectory.id)
    assert (kept.value, kept.correction, kept.user_id) == (False, "It is Ann.", "ann")


def test_a_conversation_outlives_an_answer_that_fails(cli) -> None:
    code, out = cli("chat", said=Terminal("crash please\nhello\n"))
    assert code == 0 and "You said: hello" in out


@pytest.mark.parametrize(
    ("arguments", "said", "complaint"),
    [
        (["chat"], Terminal(""), "--json needs one question"),
        (["chat"], io.StringIO(" \n"), "there is no question"),
        (["chat", "hi", "--memory", "maybe"], None, "on or off"),
        (["chat", "hi", "--policy", "v9"], None, "'agent@v9' does not exist"),
        (["documents", "add", "/nowhere/at/all.md"], None, "cannot read '/nowhere/at/all.md'"),
        (["documents", "add", "-"], io.StringIO("text"), "needs a --title"),
        (["documents", "remove", "doc_none"], None, "'doc_none'"),
        (["feedback", "trj_none", "good"], None, "'trj_none'"),
        (["report", "cyc_none"], None, "'cyc_none'"),
    ],
)
def test_a_verb_that_cannot_go_on_says_why(as_json, arguments, said, complaint) -> None:
    code, failed = as_json(*arguments, said=said)
    assert code != 0 and complaint in failed["error"]["message"]


def test_an_answer_that_fails_ends_the_one_question_with_an_error(
    cli, capsys: pytest.CaptureFixture[str], world: ServedWorld
) -> None:
    assert run(serve.app, ["chat", "crash please", "--url", world.url]) == 1
    assert "the engine broke off" in capsys.readouterr().err


# documents, feedback, cycles, reports


def test_documents_are_added_listed_found_and_removed(world: ServedWorld, cli, as_json, tmp_path: Path) -> None:
    handbook, notes = tmp_path / "handbook.md", tmp_path / "notes.txt"
    handbook.write_text("Refunds above 100 EUR need a second signature.")
    notes.write_text("The moon is far away.")
    code, added = as_json("documents", "add", str(handbook), str(notes))
    assert code == 0 and [row["title"] for row in added["data"]] == [handbook.as_posix(), notes.as_posix()]
    as_json("documents", "add", "-", "--title", "Opening hours", "--untrusted", said=io.StringIO("We open at nine."))
    listed = {row["title"] for row in as_json("documents", "list")[1]["data"]}
    assert listed == {handbook.as_posix(), notes.as_posix(), "Opening hours"}

    asyncio.run(world.memory.index.drain())
    found = as_json("documents", "search", "Refunds need a second signature", "--limit", "1")[1]["data"]
    assert [row["title"] for row in found] == [handbook.as_posix()]
    assert "second signature" in cli("documents", "search", "Refunds need a second signature")[1]
    assert f"{added['data'][1]['id']} is removed" in cli("documents", "remove", added["data"][1]["id"])[1]
    assert "Opening hours" in cli("documents", "list")[1] and len(as_json("documents", "list")[1]["data"]) == 2


@pytest.mark.parametrize(("value", "reward"), [("thumbs_up", 1.0), ("bad", 0.0), ("0.25", 0.25), ("true", 1.0)])
def test_feedback_of_the_command_line_is_a_reward(world: ServedWorld, cli, as_json, value: str, reward: float) -> None:
    target = as_json("chat", "hello")[1]["id"]
    code, out = cli("feedback", target, value, "--comment", "so so")
    assert code == 0 and target in out
    assert world.memory.trajectories.effective_reward(target) == reward


def test_a_correction_needs_no_value_and_a_category_a_name(world: ServedWorld, as_json) -> None:
    target = as_json("chat", "hello")[1]["id"]
    assert as_json("feedback", target, "--correction", "Hello, Ann.")[0] == 0
    assert as_json("feedback", target, "billing", "--name", "topic")[0] == 0
    assert "'thumbs_up'" in as_json("feedback", target, "billing")[1]["error"]["message"]
    kept = world.memory.feedback.select(target)
    assert {(one.name, one.value, one.correction) for one in kept} == {
        ("reward", None, "Hello, Ann."),
        ("topic", "billing", None),
    }


def test_without_a_cycle_a_report_prints_nothing(cli, as_json) -> None:
    assert cli("report") == (0, "")
    assert as_json("report") == (0, {"cycle": None, "report": None, "markdown": None})


def test_cycles_are_listed_and_the_newest_report_is_read(world: ServedWorld, cli, as_json) -> None:
    cycle = as_json("learn")[1]["cycle"]
    world.learner.ends_badly = True
    failed = as_json("learn")[1]["error"]["cycle"]
    out = cli("cycles")[1]
    assert cycle in out and failed in out and "promote" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "It got better." in cli("report")[1] and as_json("report")[1]["cycle"] == cycle
    assert f"cycle '{failed}' has no report" in as_json("report", failed)[1]["error"]["message"]


# style of the output


def test_the_list_of_trajectories_shows_the_question_in_80_columns(cli, as_json) -> None:
    question = "Which trains go to Oslo " + "and stop in Drammen " * 20
    asked = as_json("chat", question)[1]["id"]
    played = as_json("play", "--environment", "doors", "--seeds", "900000:900001")[1]["episodes"][0]["trajectory_id"]
    lines = cli("trajectories", "list")[1].splitlines()
    assert all(len(line) <= 80 for line in lines) and len(lines) == 3
    by_id = {line.split()[0]: line for line in lines[1:]}
    assert "Which trains go to" in by_id[asked] and "finished" in by_id[asked]
    assert "doors 900000" in by_id[played] and "1.00" in by_id[played]


def test_no_stored_text_reaches_the_terminal_as_an_escape_sequence(world: ServedWorld, cli, as_json) -> None:
    answer = as_json("chat", f"Hello {ESCAPES}")[1]
    as_json("feedback", answer["id"], "good", "--comment", f"fine {ESCAPES}")
    http = httpx.Client(base_url=world.url, trust_env=False, timeout=60)
    document = http.post("/v1/documents", json={"title": f"T {ESCAPES}", "text": f"Zebras have stripes {ESCAPES}"})
    http.close()
    assert document.status_code == 201
    for verb in (
        ["chat", f"Hello {ESCAPES}"],
        ["trajectories", "list"],
        ["trajectories", "show", answer["id"]],
        ["documents", "list"],
        ["exemplars", "list"],
        ["trajectories", "show", f"none{ESCAPES}"],
    ):
        for form in ([], ["--json"]):
            out = cli(*verb, *form)[1]
            assert not set(out) & set("\x1b\x07\x08\r\x9b\u202e"), verb
    assert "[red]late[/red]" in cli("trajectories", "show", answer["id"])[1]


def test_what_is_written_out_means_the_same_in_json() -> None:
    assert printable({"a": ["x\x1b[2J\r\ny\tz\x9b"]}) == {"a": ["x\\x1b[2J\ny\tz\\x9b"]}
    said = {"a": ESCAPES}
    assert json.loads(printable_json(json.dumps(said, ensure_ascii=False))) == said


def test_the_progress_of_a_cycle_is_printed_without_control_characters() -> None:
    console = Console(file=io.StringIO(), width=80)
    with show.CycleLines(console) as lines:
        for stage in ("collect", "completed"):
            lines.update({"stage": stage, "progress": {"done": 1, "total": 2, "message": f"at {ESCAPES}"}})
    assert not set(console.file.getvalue()) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize("can_converse", [True, False])
def test_the_banner_fits_the_model_that_serves(can_converse: bool) -> None:
    facts = {"url": "http://127.0.0.1:9", "policy": "v0", "base_model": "acme/llama", "requires_key": False}
    facts["share_live"] = "user"
    text = render_banner(facts, command="serve.py", option=" --url X", can_converse=can_converse)
    assert "acme/llama" in text
    assert ("serve.py chat --url X" in text) is can_converse
    assert ("serve.py play --tasks 32 --url X" in text) is ("serve.py learn" in text) is not can_converse


def test_every_command_of_the_page_on_the_command_line_exists() -> None:
    page = (Path(serve.__file__).parent / "docs" / "command_line.md").read_text()
    lines = [line.rpartition("serve.py ")[2] for line in page.splitlines() if "serve.py " in line]
    assert len(lines) >= 14
    root = get_command(serve.app)
    for line in lines:
        words = shlex.split(line)
        command = root.commands[words.pop(0)]
        if hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line
