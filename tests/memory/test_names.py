"""Names from outside: a valid name stays a single component of a path below the directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from memory.adapters import Manifest
from memory.names import check_name, path_below
from optimizer.config import OptimizerConfig
from runtime.config import ToolsConfig
from runtime.settings import BadSettings, overlay

OUTSIDE = ["../../outside/victim", "/etc", "a/b", "..", ".", ".hidden", "-rf", "a\x00b", "a\n", "é", "x" * 65, "a\\b"]
PARTS = st.text(st.sampled_from("ab./\\~-_ \x00\n%é0"), max_size=12)


@given(PARTS | st.text(max_size=80))
@example("../../outside/victim")
@example("a\n")
def test_whatever_is_a_name_stays_one_part_of_a_path_below_the_directory(text: str):
    directory = Path("/data/adapters")
    try:
        check_name(text)
    except ValueError as error:
        assert repr(text[:80]) in str(error)
        return
    path = path_below(directory, text)
    assert path.parent == directory and path.name == text


@given(st.lists(PARTS, max_size=4))
def test_a_path_of_parts_never_leaves_the_directory(parts: list[str]):
    directory = Path("/data")
    try:
        path = path_below(directory, *parts)
    except ValueError:
        return
    assert path.resolve().is_relative_to(directory) and len(path.parts) == len(directory.parts) + len(parts)


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_name_of_adapters_is_a_name_and_nothing_else(name: str):
    with pytest.raises(BadSettings, match=r"name = .*is not a name"):
        overlay(OptimizerConfig(), {"name": name}, origin="settings")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("key", ["environment", "learn_from"])
def test_an_environment_is_called_by_a_name(key: str, name: str):
    with pytest.raises(BadSettings, match="is not a name"):
        overlay(OptimizerConfig(), {key: [name] if key == "learn_from" else name}, origin="settings")


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_mcp_server_and_an_adapter_on_disk_are_called_by_names(name: str):
    with pytest.raises(ValidationError, match="is not a name"):
        ToolsConfig.model_validate({"mcp": {name: {"command": ["true"]}}})
    with pytest.raises(ValidationError, match="is not a name"):
        Manifest(name=name, version=1, base_model="base", base_digest="0", kind="sft")


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "data" / "ratchet-v1").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="leads out of"):
        path_below(tmp_path / "data", "ratchet-v1")


def test_the_longest_name_still_makes_an_adapter_s_directory():
    name = OptimizerConfig(name="x" * 64).name
    assert path_below(Path("/data"), "adapters", f"{name}-v123456").name.endswith("-v123456")
