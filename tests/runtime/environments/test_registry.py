"""The sources of environments: task files, classes and plug-ins; errors are reported at startup."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from memory.schema import Split
from runtime.config import EnvironmentConfig, RuntimeSettings
from runtime.environments import registry
from runtime.environments.registry import choose_environment, open_environments
from runtime.errors import EnvironmentRefused
from runtime.settings import BadSettings, read_settings
from tests.runtime.levers import Levers

HERE = __name__


class Painted(Levers):
    """An environment with an option."""

    def __init__(self, color: str = "grey") -> None:
        super().__init__()
        self.system_prompt = f"You pull {color} levers."


class Abstract(registry.Environment):
    """An abstract class, which cannot be instantiated."""


@pytest.mark.parametrize(
    ("names", "made_for", "chosen"),
    [
        (["textworld", "mine"], "textworld", "textworld"),
        (["textworld", "mine"], None, "mine"),
        (["textworld"], None, None),
        (["textworld", "mine", "yours"], None, None),
    ],
)
def test_a_cycle_that_names_none_takes_the_models_environment_or_the_only_one_added(
    names: list[str], made_for: str | None, chosen: str | None
):
    assert choose_environment(names, made_for) == chosen


def is_long(text: str, answer: int) -> bool:
    return len(text) > answer


def configure(**options: Any) -> dict[str, EnvironmentConfig]:
    return {"mine": EnvironmentConfig.model_validate(options)}


def test_a_class_of_the_configuration_is_made_with_its_options_and_takes_the_sections_name(tmp_path: Path):
    made = open_environments(configure(**{"class": f"{HERE}:Painted", "options": {"color": "red"}}), tmp_path)
    assert (made["mine"].name, made["mine"].system_prompt) == ("mine", "You pull red levers.")
    assert list(made) == ["textworld", "mine"]


def test_an_installed_plug_in_needs_no_configuration_and_may_have_options(tmp_path: Path, monkeypatch):
    point = EntryPoint("mine", f"{HERE}:Painted", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "ratchet.environments" else [])
    assert open_environments({}, tmp_path)["mine"].system_prompt == "You pull grey levers."
    painted = open_environments(configure(options={"color": "blue"}), tmp_path)
    assert painted["mine"].system_prompt == "You pull blue levers."
    missing = EntryPoint("broken", f"{HERE}:Missing", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [missing])
    with pytest.raises(EnvironmentRefused, match=r"the plug-in 'broken' \(.*:Missing\) cannot be loaded: AttributeErr"):
        open_environments({}, tmp_path)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "names neither tasks nor a class, and no installed package has an entry point 'mine'"),
        ({"class": "nowhere:Thing"}, "'nowhere:Thing' cannot be imported: No module named 'nowhere'; name it package"),
        ({"class": f"{HERE}:is_long"}, "is no class of runtime.environments.base.Environment"),
        ({"class": f"{HERE}:Abstract"}, r"Abstract\({}\) raised TypeError"),
        ({"class": f"{HERE}:Painted", "options": {"colour": "red"}}, "Painted.*raised TypeError.*colour"),
        ({"tasks": "missing.jsonl"}, "the task file 'missing.jsonl' cannot be read: No such file"),
        ({"tasks": "t.jsonl", "functions": {"long": f"{HERE}:HERE"}}, "is no function"),
    ],
)
def test_an_environment_that_cannot_be_offered_fails_the_start(options: dict[str, Any], problem: str, tmp_path: Path):
    with pytest.raises(EnvironmentRefused, match=problem):
        open_environments(configure(**options), tmp_path)


def test_textworlds_name_is_taken(tmp_path: Path):
    with pytest.raises(EnvironmentRefused, match=r"environments\.textworld: this environment comes with the project"):
        open_environments({"textworld": EnvironmentConfig(tasks=Path("t.jsonl"))}, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": "t.jsonl", "class": "a:B"},
        {"tasks": "t.jsonl", "options": {"a": 1}},
        {"class": "a:B", "system_prompt": "Hi."},
        {"temprature": 1},
    ],
)
def test_a_section_is_a_file_or_a_class_and_nothing_between(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        EnvironmentConfig.model_validate(options)


def test_the_configuration_file_names_environments(tmp_path: Path):
    rule = {"type": "function", "name": "long", "answer": 3}
    task = {"name": "a", "split": "practice", "messages": [{"role": "user", "content": "Write."}], "grader": rule}
    (tmp_path / "t.jsonl").write_text(json.dumps(task))
    toml = tmp_path / "ratchet.toml"
    toml.write_text(
        f'[environments.words]\ntasks = "{tmp_path}/t.jsonl"\nfunctions = {{ long = "{HERE}:is_long" }}\n'
        f'temperature = 0.5\n[environments.levers]\nclass = "{HERE}:Painted"\noptions = {{ color = "red" }}\n'
    )
    settings = read_settings(RuntimeSettings, toml=toml)
    made = open_environments(settings.environments, tmp_path)
    assert [task.name for task in made["words"].tasks(Split.PRACTICE, 5)] == ["a"]
    assert (made["words"].temperature, made["levers"].system_prompt) == (0.5, "You pull red levers.")
    toml.write_text("[environments.words]\ntask = 'x'\n")
    with pytest.raises(BadSettings, match=r"environments = .*Extra inputs are not permitted"):
        read_settings(RuntimeSettings, toml=toml)
