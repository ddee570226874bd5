"""What the documents show runs: Python against a served world, TOML through the settings, commands through the CLI."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

import serve
from tests.api.worlds import ServedWorld

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_readme_runs(code: str, tmp_path: Path, capsys):
    with ServedWorld(tmp_path / "data") as world:
        code = code.replace("http://127.0.0.1:8080", world.url).replace("textworld", "doors").replace("900000", "50")
        exec(compile(code, "README.md", "exec"), namespace := {})
        namespace["client"].close()
    assert "You opened the left door." in capsys.readouterr().out


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml_in_the_readme_is_a_valid_configuration(text: str, tmp_path: Path):
    (tmp_path / "ratchet.toml").write_text(text)
    settings = serve.read_all_settings(tmp_path / "ratchet.toml", {}, [])
    assert settings.engine.model == "Qwen/Qwen2.5-0.5B-Instruct"


def test_every_verb_and_file_that_the_readme_names_exists():
    verbs = set(get_command(serve.app).commands)
    assert set(re.findall(r"serve\.py ([a-z][a-z-]+)", README)) <= verbs
    tree = re.search(r"^```\n(memory/.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    room = ""
    for line in tree.splitlines():
        is_inside = line.startswith("  ")
        names = re.match(r"\s*([^\s,]+(?:, [^\s,]+)*)", line)[1]
        if not is_inside:
            room = names
        for name in names.split(", "):
            path = ROOT / (room if is_inside else "") / name
            assert path.exists(), path
