"""Settings: the precedence of their sources, and the messages of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from runtime.settings import BadSettings, overlay, parse_flags, read_settings


class EngineSettings(BaseModel, extra="forbid"):
    model: str | None = None
    port: int = 0
    extra_args: list[str] = []


class AllSettings(BaseModel, extra="forbid"):
    data: Path = Path(".data")
    engine: EngineSettings = EngineSettings()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    toml = write(tmp_path / "r.toml", 'data = "from-file"\n[engine]\nmodel = "from-file"\nport = 1\n')
    environ = {"RATCHET_ENGINE__MODEL": "from-environment", "RATCHET_ENGINE__PORT": "2", "PATH": "/bin"}
    settings = read_settings(AllSettings, toml=toml, environ=environ, flags={"engine.port": "3"})
    assert settings == AllSettings(
        data=Path("from-file"), engine=EngineSettings(model="from-environment", port=3, extra_args=[])
    )


@pytest.mark.parametrize(
    ("sources", "place"),
    [
        ({"flags": {"engine.modle": "x"}}, "flag --engine.modle"),
        ({"environ": {"RATCHET_ENGINE__MODLE": "x"}}, "environment variable RATCHET_ENGINE__MODLE"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest(sources: dict, place: str) -> None:
    with pytest.raises(BadSettings) as refused:
        read_settings(AllSettings, **sources)
    assert str(refused.value) == f"unknown setting 'engine.modle' ({place}); the nearest is 'engine.model'"


def test_an_unknown_key_in_the_file_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=r"'engin.port' \(.*r.toml\); the nearest is 'engine.port'"):
        read_settings(AllSettings, toml=write(tmp_path / "r.toml", "[engin]\nport = 1\n"))


def test_a_bad_value_is_named_with_its_place() -> None:
    with pytest.raises(BadSettings, match=r"engine.port = 'x' \(flag --engine.port\): .*valid integer"):
        read_settings(AllSettings, flags={"engine.port": "x"})


def test_a_broken_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=r"broken.toml is not valid TOML"):
        read_settings(AllSettings, toml=write(tmp_path / "broken.toml", "[engine"))
    with pytest.raises(BadSettings, match=r"no configuration file at .*absent.toml"):
        read_settings(AllSettings, toml=tmp_path / "absent.toml")


def test_lists_and_none_can_be_given_as_text() -> None:
    flags = parse_flags(["--engine.extra-args", '["--a", "b"]', "--engine.model=none"])
    settings = read_settings(AllSettings, environ={"RATCHET_ENGINE__MODEL": "x"}, flags=flags)
    assert settings.engine == EngineSettings(model=None, extra_args=["--a", "b"])
    assert read_settings(AllSettings, flags={"engine.extra_args": "a, b"}).engine.extra_args == ["a", "b"]


@pytest.mark.parametrize("arguments", [["stray"], ["--engine.port"]])
def test_what_is_not_a_flag_is_refused(arguments: list[str]) -> None:
    with pytest.raises(BadSettings):
        parse_flags(arguments)


def test_a_request_changes_single_values_and_leaves_the_rest() -> None:
    configured = AllSettings(engine=EngineSettings(model="kept", port=1))
    changed = overlay(configured, {"engine": {"port": 2}}, origin="settings")
    assert (changed.engine.model, changed.engine.port, configured.engine.port) == ("kept", 2, 1)
    with pytest.raises(BadSettings, match=r"unknown setting 'engine.prot'"):
        overlay(configured, {"engine": {"prot": 2}}, origin="settings")
