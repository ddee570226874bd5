"""The documents' examples run: Python against a server, TOML through the settings, commands through the CLI."""

from __future__ import annotations

import ast
import gzip
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import uvicorn
from typer.main import get_command

import serve
from memory.formats.registry import FORMATS, write_row
from memory.records.trajectory_queries import TRAINING_TRUST
from memory.schema import Split
from memory.team import Role
from optimizer.config import EvaluationConfig, OptimizerConfig
from optimizer.recipes import METHOD_NAMES, choose_recipe
from runtime.cli.output import run
from runtime.config import AgentConfig, LimitsConfig
from runtime.engine.model_families import EMBEDDED, PARSERS_BY_MODEL_TYPE
from runtime.environments.graders.registry import AnyGrader
from runtime.environments.registry import open_environments
from runtime.environments.science_world import ScienceWorld
from runtime.tools.base import run_tool
from runtime.tools.toolbox import Toolbox
from tests.memory.formats.rows import DEMONSTRATION, LABEL, PREFERENCE
from tests.runtime.api.playing import PlayedWorld
from tests.runtime.api.worlds import ServedWorld
from tests.support.machines import find_reason
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLIENTS = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
KEYS = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
TOOLS = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
LEARNING = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
REWARDS = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
TEAM = (ROOT / "docs" / "team.md").read_text(encoding="utf-8")
GATE = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
MODELS = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@contextmanager
def serve_app(app: Any) -> Iterator[str]:
    """Serve an ASGI application on the loopback; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_readme_runs(code: str, tmp_path: Path, capsys):
    with ServedWorld(tmp_path / "data") as world:
        code = code.replace("http://127.0.0.1:8080", world.url).replace("textworld", "doors").replace("900000", "50")
        exec(compile(code, "README.md", "exec"), namespace := {})
        namespace["client"].close()
    assert "You opened the left door." in capsys.readouterr().out


def test_the_embeddings_in_the_page_on_clients_are_the_encoders(tmp_path: Path, capsys):
    (code,) = [code for code in blocks("python", CLIENTS) if "embeddings" in code]
    with ServedWorld(tmp_path / "data") as world:
        code = code.replace("http://127.0.0.1:8080", world.url).replace("all-MiniLM-L6-v2", world.memory.encoder.name)
        exec(compile(code, "clients.md", "exec"), namespace := {})
        namespace["client"].close()
    assert capsys.readouterr().out == "2 8\n"


@pytest.mark.parametrize("code", [code for code in blocks("python", CLIENTS) if "embeddings" not in code])
def test_python_in_the_page_on_clients_runs(code: str, tmp_path: Path, capsys):
    with PlayedWorld(tmp_path / "data") as world:
        exec(compile(code.replace("http://127.0.0.1:8080", world.url), "clients.md", "exec"), namespace := {})
        if "client" in namespace:
            namespace["client"].close()
        assert world.num_trajectories == 1
    assert "Heard: rain" in capsys.readouterr().out


@pytest.mark.parametrize("command", blocks("sh", CLIENTS))
def test_commands_in_the_page_on_clients_run(command: str, tmp_path: Path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with PlayedWorld(tmp_path / "data") as world:
        command = command.replace("http://127.0.0.1:8080", world.url)
        done = subprocess.run(["sh", "-c", f"no_proxy='*' {command}"], capture_output=True, text=True, timeout=30)
    assert "You said: How is Oslo?" in done.stdout


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml_in_the_readme_is_a_valid_configuration(text: str, tmp_path: Path):
    (tmp_path / "ratchet.toml").write_text(text)
    settings = serve.read_all_settings(tmp_path / "ratchet.toml", {}, [])
    assert settings.engine.model == "Qwen/Qwen2.5-0.5B-Instruct"


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("runtime/*/*.md")], ids=lambda page: page.name
)
def test_every_link_leads_to_a_file_and_a_heading(page: Path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), f"{target}#{anchor}"


def test_the_page_on_models_names_the_embedded_ones_and_the_families_as_they_are(tmp_path: Path):
    for command in re.findall(r'^make serve ARGS="(.*)"', "".join(blocks("sh", MODELS)), re.MULTILINE):
        assert serve.read_all_settings(None, {}, shlex.split(command)).engine.model
    (text,) = blocks("toml", MODELS)
    (tmp_path / "ratchet.toml").write_text(text)
    assert serve.read_all_settings(tmp_path / "ratchet.toml", {}, []).critic.context_tokens == 32768
    (names,) = re.findall(r"^\| short name \|(.*)\|$", MODELS, re.MULTILINE)
    assert re.findall(r"`(\w+)`", names) == list(EMBEDDED)
    (temperatures,) = re.findall(r"^\| temperature without another \| ([\d.]+) \| ([\d.]+) ", MODELS, re.MULTILINE)
    assert [float(it) for it in temperatures] == [model.temperature for model in EMBEDDED.values()]
    rows = re.findall(r"^\| \w[^|]* \| (`[^|]*) \| `(\w+)`", MODELS.split("## Families")[1], re.MULTILINE)
    shown = {kind: parser for kinds, parser in rows for kind in re.findall(r"`(\w+)`", kinds)}
    assert len(shown) == 5 and shown.items() <= PARSERS_BY_MODEL_TYPE.items()


def test_every_verb_and_file_that_the_readme_names_exists():
    verbs = set(get_command(serve.app).commands)
    assert set(re.findall(r"serve\.py ([a-z][a-z-]+)", README)) <= verbs
    tree = re.search(r"^```\n(memory/.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    above: list[tuple[int, str]] = []
    named = set()
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        above = [(other, name) for other, name in above if other < depth]
        for name in re.match(r"\s*([^\s,]+(?:, [^\s,]+)*)", line)[1].split(", "):
            path = "".join(folder for _, folder in above) + name
            assert (ROOT / path).exists(), path
            named.add(path.rstrip("/"))
        if name.endswith("/"):
            above.append((depth, name))
    folders = {
        file.parent for room in ("memory", "runtime", "optimizer") for file in (ROOT / room).rglob("__init__.py")
    }
    assert {folder.relative_to(ROOT).as_posix() for folder in folders} <= named


def test_the_page_on_keys_makes_keys_that_answer(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keys = []
    for line in "".join(blocks("sh", KEYS)).splitlines():
        code = run(serve.app, [*shlex.split(line)[1:], "--data", str(tmp_path / "data"), "--json"])
        said = json.loads(capsys.readouterr().out)
        assert code == 0, said
        keys.append(said.get("key"))
    monkeypatch.setenv("RATCHET_KEY", keys[1])
    (code,) = blocks("python", KEYS)
    with PlayedWorld(tmp_path / "data") as world:
        exec(compile(code.replace("http://127.0.0.1:8080", world.url), "keys.md", "exec"), namespace := {})
        namespace["client"].close()
        (view,) = world.memory.trajectories.select(tenant="shop")
        assert view.trajectory.id == namespace["answer"].id
    assert "You said: How is Oslo?" in capsys.readouterr().out


def test_the_page_on_keys_tells_the_limits_as_they_are():
    for name, shown in (("max_body_bytes", "16 MiB"), ("max_json_depth", "100"), ("max_messages", "4096")):
        assert f"`server.limits.{name}` ({shown})" in KEYS
        value = getattr(LimitsConfig(), name)
        assert value == (16 * 2**20 if shown == "16 MiB" else int(shown))


async def test_the_tools_in_the_documents_are_offered_and_answer(tmp_path: Path, monkeypatch):
    for code in blocks("python", TOOLS):
        (tmp_path / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    (tmp_path / "ratchet.toml").write_text(blocks("toml", TOOLS)[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")

    async def find_passages(query_text: str, num: int, *, tenant: str = "") -> list[str]:
        return [f"Tea: {query_text}"]

    toolbox = Toolbox(serve.read_all_settings(None, {}, []).tools, find_passages, tmp_path / "logs")
    await toolbox.open()
    try:
        tools = {tool.name: tool for tool in toolbox.tools}
        assert list(tools) == ["price", "send_order", "search_documents", "fetch_page", "forecast"]
        assert [name for name, tool in tools.items() if tool.has_side_effects] == ["send_order"]
        assert (await run_tool(tools["price"], '{"article": "tea", "number": 2}')).content == "6"
        assert (await run_tool(tools["forecast"], '{"city": "Oslo"}')).content == "rain in Oslo"
    finally:
        await toolbox.close()


@pytest.mark.parametrize("text", blocks("toml", TOOLS))
def test_toml_about_tools_is_a_valid_configuration(text: str, tmp_path: Path):
    (tmp_path / "ratchet.toml").write_text(text)
    assert serve.read_all_settings(tmp_path / "ratchet.toml", {}, []).tools.mcp


def test_toml_about_the_gate_is_the_defaults_but_for_the_margin(tmp_path: Path):
    (text,) = blocks("toml", GATE)
    (tmp_path / "ratchet.toml").write_text(text)
    shown = serve.read_all_settings(tmp_path / "ratchet.toml", {}, []).optimizer
    assert shown.evaluation == EvaluationConfig(noninferiority_margin=0.05)
    assert set(re.findall(r"`(max_\w+)`", GATE)) <= set(EvaluationConfig.model_fields)


def read_optimizer(directory: Path, toml: str) -> OptimizerConfig:
    (directory / "ratchet.toml").write_text(toml)
    return serve.read_all_settings(directory / "ratchet.toml", {}, []).optimizer


def test_the_page_on_teams_shows_one_with_the_defaults(tmp_path: Path):
    (text,) = blocks("toml", TEAM)
    (tmp_path / "ratchet.toml").write_text(text)
    assert serve.read_all_settings(tmp_path / "ratchet.toml", {}, []).agent == AgentConfig(team=tuple(Role))


def test_the_page_on_learning_shows_settings_that_are_valid_and_every_method(tmp_path: Path):
    shown, searching = (read_optimizer(tmp_path, text) for text in blocks("toml", LEARNING))
    assert (shown.methods, searching.methods) == (["sft", "kto"], ["sft", "search"])
    assert choose_recipe(1, shown.recipe).methods["kto"].learning_rate == 5e-5
    assert tuple(re.findall(r"^\| `(\w+)` \|", LEARNING, re.MULTILINE)) == METHOD_NAMES
    assert tuple(re.findall(r"^\| `(\w+)` \|", REWARDS, re.MULTILINE)) == TRAINING_TRUST
    assert f"{shown.demonstrations.min_rows} of them (`demonstrations.min_rows`)" in LEARNING
    branches = OptimizerConfig().branches
    for name in ("num_points", "num_ways", "num_rollouts", "margin"):
        assert f"`branches.{name}` ({getattr(branches, name)})" in LEARNING
    num_own = branches.num_tasks * branches.num_tries
    num_branches = branches.num_points * branches.num_ways * branches.num_rollouts
    assert f"at most {num_own} own episodes and {num_branches} branches" in LEARNING
    assert f"{shown.labels.min_rows} good and {shown.labels.min_rows} bad ones (`labels.min_rows`)" in LEARNING


def test_the_command_on_the_page_about_the_gate_exists():
    (command,) = blocks("sh", GATE)
    assert shlex.split(command)[2] in get_command(serve.app).commands


def test_toml_about_operations_is_a_valid_configuration(tmp_path: Path):
    (text,) = blocks("toml", OPERATIONS)
    (tmp_path / "ratchet.toml").write_text(text)
    assert serve.read_all_settings(tmp_path / "ratchet.toml", {}, []).memory.database.startswith(
        "postgresql+psycopg://"
    )


def test_the_page_on_operations_runs_and_names_every_metric(tmp_path: Path, capsys):
    (code,), (command,) = blocks("python", OPERATIONS), blocks("sh", OPERATIONS)
    with ServedWorld(tmp_path / "data") as world:
        exec(compile(code.replace("http://127.0.0.1:8080", world.url), "operations.md", "exec"), namespace := {})
        namespace["client"].close()
        (view,) = world.memory.trajectories.select()
        assert len(world.memory.feedback.select(view.trajectory.id)) == 5
        assert view.reward == 0.5
        assert capsys.readouterr().out.startswith(f"{world.url}/feedback/")
        with urllib.request.urlopen(command.split()[-1].replace("http://127.0.0.1:8080", world.url)) as answer:
            families = re.findall(r"^# TYPE (ratchet_\w+) (\w+)", answer.read().decode(), re.MULTILINE)
    named = set(re.findall(r"`(ratchet_\w+)`", OPERATIONS))
    assert named == {name for name, _ in families if not name.endswith("_created")}


TASKS = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
PUBLIC = (ROOT / "docs" / "public_benchmarks.md").read_text(encoding="utf-8")


async def test_the_task_file_in_the_documents_is_valid_and_its_rows_can_be_solved(tmp_path: Path, monkeypatch):
    graders, critic, _ = blocks("python", TASKS)
    (tmp_path / "my_graders.py").write_text(graders)
    exec(compile(critic, "my_critic.py", "exec"), namespace := {})
    with serve_app(namespace["app"]) as url:
        configuration = blocks("toml", TASKS)[0].replace("http://127.0.0.1:9000", url)
        (tmp_path / "ratchet.toml").write_text(configuration)
        await _solve_the_documented_tasks(tmp_path, monkeypatch)


async def _solve_the_documented_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = blocks("jsonl", TASKS)[0]
    if find_reason():  # rows with unit tests or a machine are refused without the sandbox
        kept = [line for line in lines.splitlines(keepends=True) if not re.search("unit_tests|machine", line)]
        lines = "".join(kept)
    (tmp_path / "tasks.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    settings = serve.read_all_settings(tmp_path / "ratchet.toml", {}, [])
    environment = open_environments(settings.environments, tmp_path)["mine"]
    solutions = {
        "sum-1": "42",
        "sum-2": "It is 15.",
        "capital": "paris",
        "city": '{"name": "Rome", "population": 1}',
        "area": r"\boxed{4\pi}",
        "stock": "kiwi",
        "haiku": "Rain\nfalls\nsoftly",
        "logs": "1",
        "thanks": "Thank you, Ada!",
    }
    if find_reason():
        del solutions["logs"]
    for name, text in solutions.items():
        playthrough = await environment.start(environment.task(name))
        playthrough.read_reply(text, [])
        assert (await playthrough.close()).value == 1.0, name
    playthrough = await environment.start(environment.task("thanks"))
    playthrough.read_reply("Well done, Ada.", [])
    outcome = await playthrough.close()
    assert (outcome.value, outcome.reason) == (pytest.approx(0.4), "0.2: curt; 1: the reply contains the answer")


def test_the_table_of_graders_in_the_documents_is_complete():
    named = set(re.findall(r"^\| `(\w+)` \|", TASKS, re.MULTILINE))
    graders = {cls.model_fields["type"].annotation.__args__[0] for cls in get_args(get_args(AnyGrader)[0])}
    assert named == graders
    for cls in get_args(get_args(AnyGrader)[0]):
        (name,) = cls.model_fields["type"].annotation.__args__
        fields = re.search(rf"^\| `{name}` \|.*\| (.*) \|$", TASKS, re.MULTILINE)[1]
        aliases = {field.alias or key for key, field in cls.model_fields.items()} - {"type"}
        assert set(re.findall(r"`(\w+)`", fields)) == aliases, name


async def test_the_class_in_the_documents_is_an_environment(tmp_path: Path, monkeypatch):
    *_, code = blocks("python", TASKS)
    assert len([line for line in code.splitlines() if line.strip()]) <= 36
    (tmp_path / "guess.py").write_text(code)
    (tmp_path / "ratchet.toml").write_text(blocks("toml", TASKS)[1])
    monkeypatch.syspath_prepend(tmp_path)
    settings = serve.read_all_settings(tmp_path / "ratchet.toml", {}, [])
    environment = open_environments(settings.environments, tmp_path)["guess"]
    (task,) = environment.tasks(Split.PRACTICE, 1, offset=2)
    playthrough = await environment.start(task)
    (guess,) = playthrough.tools
    answers = [(await run_tool(guess, json.dumps({"number": number}))).content for number in (80, 50, 74)]
    assert answers == ["Lower.", "Higher.", "Found."]
    assert (await playthrough.close()).reason == "3 guesses"


def test_the_configuration_of_scienceworld_in_the_documents_is_valid(tmp_path: Path):
    (tmp_path / "ratchet.toml").write_text(blocks("toml", PUBLIC)[1])
    settings = serve.read_all_settings(tmp_path / "ratchet.toml", {}, [])
    config = settings.environments["scienceworld"]
    assert config.class_path == "runtime.environments.science_world:ScienceWorld"
    assert config.options.keys() <= inspect.signature(ScienceWorld).parameters.keys()


def test_the_configuration_of_agentbench_in_the_documents_is_valid(tmp_path: Path):
    (tmp_path / "ratchet.toml").write_text(blocks("toml", PUBLIC)[0])
    settings = serve.read_all_settings(tmp_path / "ratchet.toml", {}, [])
    assert (str(settings.environments["os"].tasks), settings.agent.max_steps) == ("agentbench-os.jsonl", 8)


def test_the_commands_about_tasks_exist_with_their_options():
    root = get_command(serve.app)
    given = [line for block in blocks("sh", TASKS + PUBLIC + REWARDS) for line in block.splitlines()]
    lines = [line for line in given if line.startswith("serve.py")]
    assert len(lines) >= 10
    for line in lines:
        _, verb, *words = shlex.split(line)
        command = root.commands[verb]
        if hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


EXAMPLES = ROOT / "docs" / "examples"


def test_the_commands_of_the_harnesses_name_tasks_and_parameters_that_exist():
    tree = ast.parse((EXAMPLES / "inspect_tasks.py").read_text(encoding="utf-8"))
    parameters = {
        node.name: {argument.arg for argument in node.args.args}
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(each) == "task" for each in node.decorator_list)
    }
    commands = re.findall(r"inspect eval docs/examples/inspect_tasks\.py@(\w+)(.*)", PUBLIC)
    assert {name for name, _ in commands} == parameters.keys()
    for name, options in commands:
        assert set(re.findall(r"-T (\w+)=", options)) <= parameters[name], name
    for path in re.findall(r"python (docs/examples/\w+\.py)", PUBLIC):
        ast.parse((ROOT / path).read_text(encoding="utf-8"))


def test_the_tasks_for_inspect_can_be_made(tmp_path: Path):
    pytest.importorskip("inspect_ai", reason="Inspect is not installed: it is no dependency")
    pytest.importorskip("inspect_evals", reason="inspect_evals is not installed: it is no dependency")
    tasks = runpy.run_path(str(EXAMPLES / "inspect_tasks.py"))
    row = {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = tasks["gsm8k"](str(tmp_path / "test.jsonl")).dataset
    assert (sample.input, sample.target) == ("What is 1 + 1?", "2")


def test_the_page_on_data_runs_and_names_every_format(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [write_row(each, FORMATS["ratchet"]) for each in (DEMONSTRATION, PREFERENCE, LABEL)]
    for name, row in zip(("expert_games.jsonl", "pairs.json.gz", "labels.jsonl"), rows, strict=True):
        line = json.dumps(row).encode() + b"\n"
        Path(name).write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    with ServedWorld(tmp_path / "data") as world:
        for line in "".join(blocks("sh", DATA)).splitlines():
            command = line.replace("textworld", "doors")
            code = run(serve.app, [*shlex.split(command)[1:], "--url", world.url, "--json"])
            assert code == 0, capsys.readouterr()
        assert json.loads(Path("demonstrations.jsonl").read_text())["conversations"]
        assert world.memory.examples.select() == []
        capsys.readouterr()
        (code,) = blocks("python", DATA)
        exec(compile(code.replace("http://127.0.0.1:8080", world.url), "data.md", "exec"), {})
    assert capsys.readouterr().out == "1 1\n"
    assert set(re.findall(r"^\| `([a-z-]+)` \| `", DATA, re.MULTILINE)) == set(FORMATS)
