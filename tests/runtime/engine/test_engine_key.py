"""The engine answers only its own server: on the loopback, and with its key."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import re
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from runtime.engine import client as completion
from runtime.engine.client import EngineClient
from runtime.engine.process import Engine
from runtime.engine.server_command import KEY_VARIABLE, server_arguments
from runtime.errors import EngineError, PolicyError
from tests.runtime.fake_engine import FakeEngine, say

ASK = [{"role": "user", "content": "hi"}]


async def test_every_call_bears_the_key(fake: FakeEngine, tmp_path: Path):
    fake.api_key = "engine-key"
    client = EngineClient(fake.url, api_key="engine-key")
    try:
        assert (await client.chat("base", ASK)).content == "hello"
        assert await client.probe() and await client.adapters() == set()
        assert len(await client.token_logprobs("base", [1, 2, 3])) == 2
        await client.load_adapter("a-v1", str(tmp_path))
        await client.unload_adapter("a-v1")
        said = []

        async def hear(delta) -> None:
            said.append(delta.text)

        assert (await client.chat_stream("base", ASK, on_delta=hear)).content == "".join(said) == "hello"
    finally:
        await client.close()


async def test_without_the_key_the_engine_answers_nobody(fake: FakeEngine):
    fake.api_key = "engine-key"
    client = EngineClient(fake.url)
    try:
        with pytest.raises(PolicyError, match="401"):
            await client.chat("base", ASK)
        assert not await client.probe()
    finally:
        await client.close()


async def test_each_engine_of_ours_gets_a_key_of_its_own_that_no_argument_shows(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started = []

    async def start(*arguments: str, env: dict[str, str], **_):
        started.append((arguments, env))
        raise OSError("not here")

    monkeypatch.setenv(KEY_VARIABLE, "somebody else's")
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    for number in range(2):
        engine = Engine(EngineConfig(model=str(base_dir)), tmp_path / str(number))
        with pytest.raises((OSError, EngineError)):
            await engine.start()
    keys = [env[KEY_VARIABLE] for _, env in started]
    assert len(set(keys)) == 2 and all(len(key) >= 43 for key in keys)
    assert not any(key in " ".join(arguments) for key in keys for arguments, _ in started)


async def test_the_key_of_an_engine_that_runs_already_comes_from_the_environment(
    fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake.api_key, fake.script = "shared", say("hello")
    monkeypatch.setenv(KEY_VARIABLE, "shared")
    engine = Engine(EngineConfig(url=fake.url), tmp_path)
    await engine.start()
    assert engine.is_ready
    await engine.stop()


@pytest.mark.parametrize("extra", [[], ["--host", "0.0.0.0"], ["--host=0.0.0.0", "--port", "1"]])
def test_no_extra_argument_makes_the_engine_listen_elsewhere(base_dir: Path, extra: list[str]):
    given = server_arguments(EngineConfig(extra_args=extra), base_dir, 8123)
    assert given[-4:] == ["--host", "127.0.0.1", "--port", "8123"]


def test_the_installed_vllm_guards_every_route_that_we_use():
    package = importlib.util.find_spec("vllm")
    if package is None:
        pytest.skip("vLLM is not installed")
    source = Path(package.submodule_search_locations[0]) / "entrypoints/serve/middleware/authenticate.py"
    (guarded,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "GUARDED_PREFIX"
    ]
    ours = set(re.findall(r'"(/[a-z0-9_/]+)"', Path(completion.__file__).read_text(encoding="utf-8")))
    assert "/v1/chat/completions" in ours
    # token counts, and the ids of the caller's own text: no stored data
    assert {path for path in ours if not path.startswith(guarded)} == {"/metrics", "/tokenize"}
