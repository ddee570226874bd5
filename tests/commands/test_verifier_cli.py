"""The commands `verifier train` and `verifier grade` refuse unusable input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import serve
from memory.store import Memory
from runtime.cli.output import run
from tests.memory.episodes import PATIENT, HashingEncoder


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run(serve.app, ["verifier", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)["error"]["message"]


def test_what_is_missing_is_named(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, message = call(capsys, "train", "--data", "data")
    assert code == 1 and "give --environment NAME, or --logged" in message
    code, message = call(capsys, "train", "--data", "data", "--environment", "textworld")
    assert code == 1 and "has no base model yet: start `serve.py serve` on it once" in message
    code, message = call(capsys, "grade", "--data", "data", "--environment", "textworld")
    assert code == 1 and "there is no verifier yet: `serve.py verifier train` makes one" in message
    code, message = call(capsys, "grade", "--logged", "--environment", "textworld")
    assert code == 2 and "give either --environment or --logged" in message


def test_a_directory_that_a_server_has_is_refused(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()):
        code, message = call(capsys, "train", "--data", "data")
    assert code == 1 and str(tmp_path / "data") in message
