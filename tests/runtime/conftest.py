"""Fixtures of the runtime tests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from memory.adapters import Fingerprint, Manifest, digest_base, write_manifest
from memory.schema import Policy
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig, EngineConfig
from runtime.engine.process import Engine
from runtime.serving.hotswap import HotSwap
from tests.memory.episodes import HashingEncoder
from tests.runtime.fake_engine import FakeEngine, base_logprobs, say
from tests.runtime.levers import Levers

PROBE_IDS = [3, 5, 8, 13, 21, 34]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "data", encoder=HashingEncoder()) as memory:
        yield memory


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    """The directory of a base model, with only the files that code outside an engine reads."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    return directory


@pytest.fixture
async def fake(base_dir: Path) -> AsyncIterator[FakeEngine]:
    async with FakeEngine(say("hello"), base_dir=base_dir) as fake:
        yield fake


@pytest.fixture
async def engine(fake: FakeEngine, tmp_path: Path) -> AsyncIterator[Engine]:
    settings = EngineConfig(url=fake.url, probe_interval_seconds=0.05, probe_timeout_seconds=0.2)
    engine = Engine(settings, tmp_path / "data")
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def hotswap(memory: Memory, engine: Engine) -> HotSwap:
    await memory.policies.register_base("base")
    return HotSwap(memory.policies, engine)


@pytest.fixture
def levers() -> Levers:
    return Levers()


@pytest.fixture
def agent(memory: Memory, hotswap: HotSwap, levers: Levers) -> Agent:
    return Agent(memory, hotswap, {"levers": levers}, AgentConfig(max_steps=6, max_seconds=20.0))


def write_adapter(directory: Path, base_dir: Path, version: int, *, shift: float = 0.5, **fields) -> Path:
    """Write an adapter as a trainer would; the fake engine's log-probs with it are the base's, shifted."""
    directory.mkdir(parents=True)
    prefix = "base_model.model.layers.0.q"
    weights = {f"{prefix}.lora_A.weight": numpy.ones((4, 16), "float32")}
    weights[f"{prefix}.lora_B.weight"] = numpy.full((16, 4), 0.5, "float32")
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    before = base_logprobs(PROBE_IDS)
    after = [value - shift for value in before]
    values = {"name": "pocket", "version": version, "base_model": "base", "kind": "sft"}
    values["base_digest"] = digest_base(base_dir)
    values["fingerprint"] = Fingerprint(token_ids=PROBE_IDS, base_logprobs=before, adapter_logprobs=after)
    write_manifest(directory, Manifest(**values | fields))
    return directory


MakePolicy = Callable[..., Awaitable[Policy]]


@pytest.fixture
def make_policy(memory: Memory, base_dir: Path) -> MakePolicy:
    """Draft a policy with an adapter of its own: `await make_policy()`."""

    async def make(**fields) -> Policy:
        version = len(memory.policies.select())
        path = write_adapter(memory.data_dir / "adapters" / f"pocket-v{version}", base_dir, version, **fields)
        return await memory.policies.draft(adapter_path=str(path), parent=0)

    return make
