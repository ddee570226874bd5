"""The command line against a running server: output for people, output for programs, and errors."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import serve
from memory.records.insights import InsightOperation, OperationKind
from memory.schema import PolicyStage
from memory.statistics import wilson_interval
from memory.store import Memory
from runtime.cli.output import run
from runtime.cli.play import parse_seeds
from tests.memory.episodes import HashingEncoder
from tests.runtime.api.worlds import ServedWorld

ROOT = Path(serve.__file__).parent
HEAVY = ("torch", "transformers", "langgraph", "chromadb", "fastapi", "sqlmodel", "sentence_transformers")

Cli = Callable[..., tuple[int, str]]
AsJson = Callable[..., tuple[int, dict]]


@pytest.fixture
def cli(world: ServedWorld, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str) -> tuple[int, str]:
        code = run(serve.app, [*arguments, "--url", world.url])
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def as_json(cli: Cli) -> AsJson:
    def call(*arguments: str) -> tuple[int, dict]:
        code, out = cli(*arguments, "--json")
        assert out.count("\n") == 1, "one JSON object, on one line, and nothing else"
        return code, json.loads(out)

    return call


def test_play_sums_up_what_it_played(as_json: AsJson) -> None:
    code, played = as_json("play", "--environment", "doors", "--tasks", "8")
    assert code == 0
    assert (played["num_tasks"], played["num_successes"], played["success"]) == (8, 4, 0.5)
    assert (played["low"], played["high"]) == pytest.approx(wilson_interval(4, 8))
    assert (played["num_steps"], played["prompt_tokens"], played["output_tokens"]) == (16, 80, 24)
    assert (played["policy"], played["num_failed"], played["split"]) == ("v0", 0, "held-out")


def test_play_takes_seeds_a_policy_and_leaves_memory_off(world: ServedWorld, as_json: AsJson) -> None:
    given = ["--environment", "doors", "--seeds", "60:64", "--policy", "v0", "--memory", "off"]
    _, played = as_json("play", *given)
    assert [episode["task"] for episode in played["episodes"]] == ["60", "61", "62", "63"]
    assert played["use_memory"] is False
    assert world.engine.calls[-1]["temperature"] == 0


def test_play_ends_with_a_table(cli: Cli) -> None:
    code, out = cli("play", "--environment", "doors", "--tasks", "4", "--split", "practice")
    assert code == 0 and "50.0 %" in out and "episodes/s" in out


def test_learn_ends_with_the_verdict_and_the_report(as_json: AsJson) -> None:
    code, learned = as_json("learn", "--practice", "4", "--tasks", "2", "--set", "recipe.sft_epochs=3")
    assert code == 0
    assert (learned["verdict"], learned["policy"], learned["active"]) == ("promote", "v1", "v1")
    assert learned["report"] == {"cells": {}}


def test_learn_sends_its_settings_and_shows_the_report(world: ServedWorld, cli: Cli) -> None:
    code, out = cli("learn", "--practice", "4", "--tasks", "2", "--set", "recipe.sft_epochs=3")
    assert code == 0 and "It got better." in out
    settings = world.memory.cycles.select()[0].settings
    assert settings == {"practice_episodes": 4, "evaluation": {"num_tasks": 2}, "recipe": {"sft_epochs": 3}}


def test_learning_from_the_log_alone_asks_the_server_to_play_nothing(world: ServedWorld, as_json: AsJson) -> None:
    assert as_json("learn", "--logged")[0] == 0
    settings = {"environment": "", "practice_episodes": 0, "explore_episodes": 0}
    assert world.memory.cycles.select()[0].settings == settings


NEEDED = {
    "name": "demonstrations",
    "needed": 16,
    "available": 3,
    "playable": 4,
    "num_missing": 9,
    "is_required": True,
    "detail": "3 of 40 rewarded trajectories are successes",
    "mend": "play more practice_episodes",
}


def test_learn_says_what_is_missing_and_plays_nothing(world: ServedWorld, cli: Cli, as_json: AsJson) -> None:
    world.learner.needs = [NEEDED]
    code, failed = as_json("learn", "--practice", "4")
    assert code == 1 and world.memory.cycles.select() == []
    message = failed["error"]["message"]
    assert "nothing was played" in message and "9 demonstrations are missing" in message
    assert "3 of 40 rewarded" in message and "play more practice_episodes" in message
    code, needs = as_json("learn", "--check")
    assert code == 1 and needs["data"][0] == NEEDED and not needs["is_ready"]
    out = cli("learn", "--check")[1]
    assert "demonstrations" in out and "play more practice_episodes" in " ".join(out.split())


def test_learn_says_how_much_there_is_before_it_begins(
    world: ServedWorld, capsys: pytest.CaptureFixture[str], as_json: AsJson
) -> None:
    world.learner.needs = [NEEDED | {"available": 30, "num_missing": 0}]
    assert run(serve.app, ["learn", "--url", world.url]) == 0
    said = capsys.readouterr()
    lines = [line.split() for line in said.err.splitlines()]
    assert ["ok", "demonstrations", "16", "30", "4"] in lines and ["ok", "engine", "1", "1", "0"] in lines
    assert said.err.index("demonstrations") < said.err.index("cycle cyc_") and "It got better." in said.out
    assert as_json("learn", "--check")[0] == 0 and len(world.memory.cycles.select()) == 1


def test_judge_ends_with_the_verdict_and_the_report(world: ServedWorld, as_json: AsJson) -> None:
    code, learned = as_json("learn")
    drafted = asyncio.run(world.memory.policies.draft(parent=0, cycle_id=learned["cycle"]))
    asyncio.run(world.memory.policies.move(drafted.version, PolicyStage.CANDIDATE))

    code, judged = as_json("judge", drafted.name)

    assert code == 0
    assert (judged["verdict"], judged["reason"]) == ("uninformative", "nobody played")
    assert (judged["policy"], judged["active"], judged["report"]) == ("v2", "v1", {"cells": {}})


def test_a_cycle_that_fails_says_why_and_fails_the_verb(world: ServedWorld, as_json: AsJson) -> None:
    world.learner.ends_badly = True
    code, failed = as_json("learn")
    assert code == 1 and "3 are missing" in failed["error"]["message"]
    assert failed["error"]["cycle"] and failed["error"]["stage"] == "error"


def test_a_second_learn_is_told_of_the_first_and_can_watch_it(world: ServedWorld, as_json: AsJson) -> None:
    world.learner.is_held = True
    cycle = httpx.post(f"{world.url}/v1/cycles", trust_env=False, timeout=60).json()["id"]
    code, refused = as_json("learn")
    assert code == 1 and cycle in refused["error"]["message"]
    threading.Timer(0.5, lambda: setattr(world.learner, "is_held", False)).start()
    code, learned = as_json("learn", "--cycle", cycle)
    assert code == 0 and learned["cycle"] == cycle


def test_a_cycle_is_cancelled(world: ServedWorld, as_json: AsJson, cli: Cli) -> None:
    world.learner.is_held = True
    cycle = httpx.post(f"{world.url}/v1/cycles", trust_env=False, timeout=60).json()["id"]
    assert cli("learn", "--cancel", cycle) == (0, f"{cycle} is cancelled\n")
    code, refused = as_json("learn", "--cancel", cycle)
    assert code == 1 and "has ended" in refused["error"]["message"]


def test_policies_promote_and_rollback(as_json: AsJson, cli: Cli) -> None:
    as_json("learn")
    assert as_json("policies")[1]["active"] == "v1"
    assert as_json("rollback")[1]["name"] == "v0"
    assert as_json("promote", "v1")[1]["stage"] == "active"
    assert "retired" in cli("policies")[1]


def test_a_trajectory_is_shown_like_a_play(as_json: AsJson, cli: Cli) -> None:
    trajectory_id = as_json("play", "--environment", "doors", "--tasks", "1")[1]["episodes"][0]["trajectory_id"]
    assert as_json("trajectories", "show", trajectory_id)[1]["id"] == trajectory_id
    story = cli("trajectories", "show", trajectory_id)[1]
    assert 'open({"door": "left"})' in story and "reward 1.00 by environment" in story
    assert trajectory_id in cli("trajectories", "list")[1]


def test_memories_are_approved_edited_and_retired(world: ServedWorld, as_json: AsJson, cli: Cli) -> None:
    lesson = InsightOperation(OperationKind.ADD, "", "chat", "be brief", user_id="jane")
    (insight,) = asyncio.run(world.memory.insights.apply([lesson]))
    said = {"model": "agent", "messages": [{"role": "user", "content": "hi"}], "user": "jane"}
    exemplar = httpx.post(f"{world.url}/v1/chat/completions", json=said, trust_env=False, timeout=60).json()["id"]
    httpx.post(f"{world.url}/v1/feedback", json={"target": exemplar, "value": True}, trust_env=False, timeout=60)

    assert [row["id"] for row in as_json("insights", "--status", "pending")[1]["data"]] == [insight.id]
    assert "jane" in cli("insights")[1] and "jane" in cli("exemplars", "list", "--status", "pending")[1]
    assert as_json("insights", "edit", insight.id, "be short")[1]["shown_to"] == "user"
    assert as_json("insights", "approve", insight.id, "--text", "be kind")[1]["text"] == "be kind"
    assert "is shown to nobody: be kind" in cli("insights", "retire", insight.id)[1]
    assert "is shown to the whole tenant: hello" in cli("exemplars", "approve", exemplar, "--text", "hello")[1]
    assert as_json("exemplars", "retire", exemplar)[1]["shown_to"] == "nobody"
    code, refused = as_json("insights", "approve", insight.id)
    assert code == 1 and "was retired" in refused["error"]["message"]
    assert "no insight has the id 'ins_none'" in as_json("insights", "retire", "ins_none")[1]["error"]["message"]


@pytest.mark.parametrize("verb", [["insights"], ["rebuild-index"], ["doctor"]])
def test_the_other_verbs_answer_too(as_json: AsJson, cli: Cli, verb: list[str]) -> None:
    assert "error" not in as_json(*verb)[1]
    assert cli(*verb)[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["play", "--policy", "v9", "--environment", "doors"], "'agent@v9' does not exist"),
        (["play", "--environment", "chess"], "no environment is called 'chess'"),
        (["play", "--seeds", "9:1", "--environment", "doors"], "name no task"),
        (["play", "--memory", "maybe"], "on or off"),
        (["play", "--split", "dreams", "--environment", "doors"], "split"),
        (["promote", "v9"], "no policy has version 9"),
        (["trajectories", "show", "nobody"], "'nobody'"),
        (["learn", "--set", "nonsense=1"], "'nonsense'"),
        (["learn", "--set", "nonsense"], "key=value"),
        (["learn", "--logged", "--practice", "4"], "plays nothing"),
        (["judge", "v0"], "policy v0 is 'active': only a cycle's candidate can be judged"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_every_failure_is_one_json_object_and_an_exit_code(as_json: AsJson, arguments: list[str], said: str) -> None:
    code, failed = as_json(*arguments)
    assert code != 0 and said in failed["error"]["message"]


def test_an_episode_that_fails_is_counted_not_fatal(
    world: ServedWorld, as_json: AsJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = world.services.environments["doors"].start

    async def start(task):
        playthrough = await original(task)
        if task.name == "51":
            playthrough.task_text = f"crash {task.name}"
        return playthrough

    monkeypatch.setattr(world.services.environments["doors"], "start", start)
    code, played = as_json("play", "--environment", "doors", "--seeds", "50:53")
    assert code == 0
    assert (played["num_tasks"], played["num_failed"], played["num_successes"]) == (3, 1, 2)


def test_play_waits_for_an_engine_that_is_back_in_a_moment(world: ServedWorld, as_json: AsJson) -> None:
    world.engine.is_ready = False
    threading.Timer(0.5, lambda: setattr(world.engine, "is_ready", True)).start()
    code, played = as_json("play", "--environment", "doors", "--tasks", "1")
    assert code == 0 and played["num_tasks"] == 1


def test_without_a_server_the_verb_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert run(serve.app, ["policies", "--url", "http://127.0.0.1:9"]) == 1
    assert "start one with" in capsys.readouterr().err
    assert time.monotonic() - started < 30


def test_the_doctor_reports_a_lost_database_and_makes_no_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "data"
    Memory.open(data, encoder=HashingEncoder()).close()
    (data / "ratchet.db").unlink()
    code = run(serve.app, ["doctor", "--data", str(data), "--url", "http://127.0.0.1:9", "--json"])
    diagnosis = json.loads(capsys.readouterr().out)
    (check,) = diagnosis["checks"]
    assert (code, diagnosis["is_ok"], check["is_ok"]) == (1, False, False)
    assert check["name"] == "storage" and "is missing, but this directory has had one" in check["detail"]
    assert not (data / "ratchet.db").exists()


def test_client_verbs_import_nothing_heavy() -> None:
    code = (
        "import sys, serve, runtime.cli.client, runtime.cli.play, runtime.cli.cycles, runtime.cli.render;"
        "import runtime.cli.chat, runtime.cli.documents;"
        "import runtime.cli.datasets.importing, runtime.cli.datasets.exporting;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_seeds_are_read_as_python_reads_ranges() -> None:
    assert parse_seeds("7:10") == ["7", "8", "9"]
    assert parse_seeds("7") == ["7"]
    with pytest.raises(ValueError, match="not as '7:x'"):
        parse_seeds("7:x")
