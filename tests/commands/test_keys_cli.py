"""The commands about keys, with and without a running server, and the addresses a server refuses to listen on."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

import serve
from memory.store import open_keys
from runtime.cli.output import Failure, run
from runtime.cli.server_process import require_keys_or_loopback
from tests.runtime.api.worlds import ServedWorld


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("RATCHET_URL", "RATCHET_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, dict]:
        code = run(serve.app, [*arguments, "--json"])
        out = capsys.readouterr().out
        assert out.count("\n") == 1, "one JSON object, on one line, and nothing else"
        return code, json.loads(out)

    return call


def test_keys_are_made_listed_and_revoked_in_the_data_directory(cli, tmp_path: Path) -> None:
    at = ["--data", str(tmp_path / "data")]
    more = ["--tenant", "acme", "--requests-per-minute", "60"]
    code, made = cli("keys", "create", "the shop", "--scope", "infer", "--scope", "feedback", *more, *at)
    assert code == 0 and made["key"].startswith("ratchet_")
    assert (made["name"], made["scopes"], made["tenant"]) == ("the shop", ["infer", "feedback"], "acme")
    listed = cli("keys", "list", *at)[1]["data"]
    assert {row["id"] for row in listed} == {made["id"], made["operator"]["id"]}
    assert "key" not in listed[0] and "digest" not in listed[0]
    assert cli("keys", "revoke", made["id"], *at)[1]["revoked_at"] is not None
    code, refused = cli("keys", "revoke", "nobody", *at)
    assert code == 1 and "'nobody'" in refused["error"]["message"]
    code, refused = cli("keys", "revoke", made["operator"]["id"], *at)
    assert code == 1 and "make another with the scope admin" in refused["error"]["message"]
    code, refused = cli("keys", "create", "x", "--scope", "infer", "--tokens-per-minute", str(2**63), *at)
    assert code == 2 and str(2**63) in refused["error"]["message"]
    code, refused = cli("keys", "create", "x", "--scope", "fly", *at)
    assert code == 2 and "'fly' is no scope" in refused["error"]["message"]


def test_people_read_the_key_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    at = ["--data", str(tmp_path / "data")]
    assert run(serve.app, ["keys", "create", "the shop", "--scope", "infer", *at]) == 0
    said = capsys.readouterr().out
    assert said.count("  ratchet_") == 2 and "the only time the two keys are shown" in said
    assert "not locked out" in " ".join(said.split()) and "for admin" in said
    assert run(serve.app, ["keys", "create", "the other shop", "--scope", "infer", *at]) == 0
    said = capsys.readouterr().out
    assert said.count("  ratchet_") == 1 and "the only time the key is shown" in said
    assert run(serve.app, ["keys", "list", *at]) == 0
    listed = capsys.readouterr().out
    assert "the shop" in listed and "ratchet_" not in listed


def test_a_running_server_is_asked_with_a_key(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServedWorld(tmp_path / "data") as world:
        made = cli("keys", "create", "operator", "--scope", "admin", "--url", world.url)[1]
        code, refused = cli("keys", "list", "--url", world.url)
        assert code == 1 and (refused["error"]["status"], refused["error"]["code"]) == (401, "invalid_api_key")
        assert len(cli("keys", "list", "--url", world.url, "--key", made["key"])[1]["data"]) == 1
        monkeypatch.setenv("RATCHET_KEY", made["key"])
        for verb in (["policies"], ["insights"], ["trajectories", "list"], ["keys", "list"]):
            assert cli(*verb, "--url", world.url)[0] == 0
        played = cli("play", "--environment", "doors", "--tasks", "1", "--url", world.url)[1]
        assert played["num_tasks"] == 1
        # The directory is owned by the server, which is asked once its address is recorded.
        code, refused = cli("keys", "list", "--data", str(tmp_path / "data"))
        said = refused["error"]["message"]
        assert code == 1 and "in use by process" in said and "--url" in said
        world.memory.set_address(world.url)
        assert len(cli("keys", "list", "--data", str(tmp_path / "data"))[1]["data"]) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.7", "::"])
async def test_an_open_address_without_keys_is_refused_by_name(tmp_path: Path, host: str) -> None:
    with open_keys(tmp_path) as keys:
        with pytest.raises(Failure, match=rf"server\.host = {host!r} is open to others.*keys create"):
            require_keys_or_loopback(host, keys)
        await keys.create("operator", ["admin"])
        require_keys_or_loopback(host, keys)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_the_loopback_needs_no_keys(tmp_path: Path, host: str) -> None:
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with open_keys(tmp_path) as keys:
        require_keys_or_loopback(host, keys)
