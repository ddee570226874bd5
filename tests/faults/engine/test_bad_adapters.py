"""Bad adapters are refused with file and reason before the engine loads them; the old policy stays active."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from memory.store import Memory
from runtime.errors import AdapterError
from runtime.serving.hotswap import HotSwap
from tests.memory.spoiled import DAMAGES
from tests.runtime.conftest import MakePolicy, base_dir, engine, fake, hotswap, make_policy, memory
from tests.runtime.fake_engine import FakeEngine
from tests.support.waiting import wait_until

__all__ = ["base_dir", "engine", "fake", "hotswap", "make_policy", "memory"]


@pytest.fixture
async def following(hotswap: HotSwap):
    """The loop that loads each policy that becomes active."""
    task = asyncio.create_task(hotswap.follow())
    await wait_until(lambda: hotswap.active_version == 0)
    yield task
    task.cancel()


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
async def test_a_spoiled_adapter_that_is_promoted_never_reaches_the_engine(
    following,
    hotswap: HotSwap,
    memory: Memory,
    make_policy: MakePolicy,
    fake: FakeEngine,
    damage: Callable,
    reason: str,
):
    policy = await make_policy()
    damage(Path(policy.adapter_path))
    await memory.policies.promote(policy.version)
    await wait_until(lambda: hotswap.refusal is not None)
    assert reason in hotswap.refusal and policy.adapter_path in hotswap.refusal
    assert (fake.ever_loaded, hotswap.active_version) == ([], 0)
    async with hotswap.lease() as leased:
        await leased.complete([{"role": "user", "content": "hi"}])


async def test_a_path_that_leads_elsewhere_is_refused(
    hotswap: HotSwap, memory: Memory, make_policy: MakePolicy, fake: FakeEngine, tmp_path: Path
):
    sound = Path((await make_policy()).adapter_path)
    (tmp_path / "link").symlink_to(sound)
    for path, reason in ((sound.parent / "x" / ".." / sound.name, "leads through"), (tmp_path / "link", "not a dir")):
        policy = await memory.policies.draft(adapter_path=str(path), parent=0)
        with pytest.raises(AdapterError, match=f"{path.name}.*{reason}"):
            await hotswap.activate(policy.version)
    assert fake.ever_loaded == []
