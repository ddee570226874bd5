"""A memory whose base is the pocket model, with a fake engine that serves it, for tests of whole cycles."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from memory.store import Memory
from runtime.config import EngineConfig
from runtime.engine.model_families import POCKET_MODEL
from runtime.engine.process import Engine
from runtime.serving.hotswap import HotSwap
from tests.memory.episodes import PATIENT, HashingEncoder
from tests.runtime.fake_engine import FakeEngine


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The pocket model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POCKET_MODEL)


@contextlib.asynccontextmanager
async def serve_played(directory: Path, played: FakeEngine) -> AsyncIterator[tuple[Memory, Engine, HotSwap]]:
    """Yield the memory in `directory`, the client of the fake engine `played`, and the swap, with the base active."""
    with Memory.open(directory, PATIENT, encoder=HashingEncoder()) as memory:
        async with played:
            engine = Engine(EngineConfig(url=played.url), memory.data_dir)
            await engine.start()
            await memory.policies.register_base(str(POCKET_MODEL))
            hotswap = HotSwap(memory.policies, engine)
            await hotswap.activate(0)
            yield memory, engine, hotswap
            await engine.stop()
