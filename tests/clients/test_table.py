"""The table of clients shows the results of the runs, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.clients import run
from tests.clients.matrix import CLIENTS, HERE, Client
from tests.clients.table import BEGIN, END, Cell, render, replace_table


def cell(check: str, outcome: str = "passed", reason: str = "", client: str = "openai", model: str = "pocket") -> Cell:
    return Cell(model, client, "1.2", check, outcome, reason, "2026-11-24")


def test_every_cell_that_did_not_pass_is_named_with_its_reason():
    table = render([cell("chat"), cell("tools", "model", "it said\n'hi'"), cell("stream", "failed", "a | b")])
    assert "| openai | 1.2 | yes | fails (1) | model (2) | 2026-11-24 |" in table
    assert "1. openai, stream: a \\| b" in table and "2. openai, tools: it said 'hi'" in table


def test_a_check_that_a_client_does_not_have_is_left_empty_and_each_model_has_a_table():
    table = render([cell("chat"), cell("stream", client="dspy"), cell("chat", model="SmolLM2")])
    assert "| openai | 1.2 | yes |  | 2026-11-24 |" in table and "| dspy | 1.2 |  | yes | 2026-11-24 |" in table
    assert table.count("| version |") == 2


def test_the_table_replaces_what_is_between_the_marks_alone():
    page = replace_table(f"before\n{BEGIN}\nold\n{END}\nafter\n", "new")
    assert page == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        replace_table("no marks", "new")


def test_the_page_shows_the_results_of_every_client_with_every_model():
    cells = [Cell(**each) for each in json.loads(run.RESULTS.read_text(encoding="utf-8"))]
    assert {(cell.model, cell.client) for cell in cells} == {
        (model, client.name) for model in run.MODELS.values() for client in CLIENTS
    }
    page = run.PAGE.read_text(encoding="utf-8")
    assert replace_table(page, render(cells)) == page


def test_every_client_has_a_script_and_every_package_is_pinned():
    for client in CLIENTS:
        assert client.script.is_file(), client
        if client.requirements is not None:
            pins = client.requirements.read_text(encoding="utf-8").split("\n")
            assert pins and all("==" in line for line in pins if line), client
    lock = json.loads((HERE / "node" / "package-lock.json").read_text(encoding="utf-8"))
    wanted = json.loads((HERE / "node" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert {name: lock["packages"][f"node_modules/{name}"]["version"] for name in wanted} == wanted


def test_a_check_that_raises_is_a_line_of_its_own_and_the_next_one_still_runs(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from checks import ModelLimit, expect, run_checks\n"
        "def bad(): expect(0, 'nothing came')\n"
        "def shy(): raise ModelLimit('no call')\n"
        "run_checks({'a': bad, 'b': shy, 'c': lambda: None})\n"
    )
    command = [sys.executable, str(script), str(HERE / "scripts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["check"], each["outcome"]) for each in found] == [("a", "failed"), ("b", "model"), ("c", "passed")]
    assert found[0]["reason"] == "AssertionError: nothing came"


def write_client(directory: Path, outcome: str) -> Client:
    """Return a client whose script prints one check with this outcome."""
    script = directory / f"{outcome}.py"
    line = json.dumps({"check": "chat", "outcome": outcome, "reason": "as it was said"})
    script.write_text(f"print({line!r})\n", encoding="utf-8")
    return Client("curl", script)


def test_a_check_that_failed_fails_the_run_and_a_limit_of_the_model_does_not(tmp_path, monkeypatch):
    page = tmp_path / "docs" / "clients.md"
    page.parent.mkdir()
    page.write_text(f"{BEGIN}\nold\n{END}\n", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "PAGE", page)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(sys, "argv", ["run", "--url", "http://127.0.0.1:9", "--model", "pocket"])

    monkeypatch.setattr(run, "CLIENTS", [write_client(tmp_path, "model")])
    earlier = [asdict(cell("chat", outcome="no call", client="llm", model="the pocket model"))]
    run.RESULTS.write_text(json.dumps(earlier), encoding="utf-8")  # an outcome that no longer exists
    run.main()
    assert "| model (1) |" in page.read_text(encoding="utf-8")

    monkeypatch.setattr(run, "CLIENTS", [write_client(tmp_path, "failed")])
    with pytest.raises(SystemExit, match="1 checks failed"):
        run.main()
    assert "1. curl, chat: as it was said" in page.read_text(encoding="utf-8")


def test_a_script_that_dies_is_a_failed_check(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit('the package is broken')", encoding="utf-8")
    (died,) = run.run_client(Client("curl", script), "http://127.0.0.1:9", "pocket")
    assert (died.check, died.outcome, died.reason.strip()) == ("script", "failed", "the package is broken")
