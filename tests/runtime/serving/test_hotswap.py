"""The swap: probed before it is activated, unnoticed by running leases, refused without harm."""

from __future__ import annotations

import asyncio

import pytest

from memory.store import Memory
from runtime.engine.process import Engine
from runtime.errors import AdapterError
from runtime.serving.hotswap import HotSwap
from tests.runtime.conftest import MakePolicy
from tests.runtime.fake_engine import FakeEngine
from tests.support.waiting import wait_until


async def test_boot_is_the_first_swap(hotswap: HotSwap):
    async with hotswap.lease() as leased:
        assert (leased.version, leased.served_name) == (0, "base")


async def test_an_episode_keeps_its_policy_while_another_takes_over(hotswap: HotSwap, make_policy: MakePolicy):
    policy = await make_policy()
    async with hotswap.lease() as before:
        await hotswap.activate(policy.version)
        async with hotswap.lease() as after:
            assert (before.version, after.version) == (0, 1)
            assert after.served_name == "pocket-v1"


async def test_a_promoted_row_is_followed(hotswap: HotSwap, memory: Memory, make_policy: MakePolicy):
    following = asyncio.create_task(hotswap.follow())
    await wait_until(lambda: hotswap.active_version == 0)
    policy = await make_policy()
    await memory.policies.promote(policy.version)
    await wait_until(lambda: hotswap.active_version == policy.version)
    await memory.policies.rollback()
    await wait_until(lambda: hotswap.active_version == 0)
    following.cancel()


async def test_a_waiting_request_returns_once_the_follower_has_reached_its_version(
    hotswap: HotSwap, memory: Memory, make_policy: MakePolicy
):
    following = asyncio.create_task(hotswap.follow())
    policy = await make_policy()
    await memory.policies.promote(policy.version)
    await hotswap.wait_for(policy.version)
    assert hotswap.active_version == policy.version
    await hotswap.wait_for(0)  # no longer the active row: nothing to wait for
    following.cancel()


async def test_a_waiting_request_gets_the_followers_refusal(
    hotswap: HotSwap, memory: Memory, make_policy: MakePolicy, fake: FakeEngine
):
    policy = await make_policy()
    fake.ignores_adapters = True
    following = asyncio.create_task(hotswap.follow())
    await memory.policies.promote(policy.version)
    with pytest.raises(AdapterError, match="served as the bare base"):
        await hotswap.wait_for(policy.version)
    following.cancel()


async def test_the_retired_policy_stays_loaded_and_the_one_before_it_goes(
    hotswap: HotSwap, make_policy: MakePolicy, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("runtime.serving.hotswap.NUM_IDLE_KEPT", 0)
    for _ in range(3):
        await hotswap.activate((await make_policy()).version)
    assert fake.adapters.keys() == {"pocket-v2", "pocket-v3"}


async def test_the_old_policy_is_drained_before_it_is_unloaded(
    hotswap: HotSwap, make_policy: MakePolicy, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("runtime.serving.hotswap.NUM_IDLE_KEPT", 0)
    policies = [await make_policy() for _ in range(3)]
    await hotswap.activate(policies[0].version)
    async with hotswap.lease() as leased:
        await hotswap.activate(policies[1].version)
        await hotswap.activate(policies[2].version)
        assert leased.served_name in fake.adapters
    await wait_until(lambda: leased.served_name not in fake.adapters)


async def test_an_adapter_served_as_the_bare_base_is_refused(
    hotswap: HotSwap, make_policy: MakePolicy, fake: FakeEngine
):
    policy = await make_policy()
    fake.ignores_adapters = True
    await hotswap.activate(0)
    with pytest.raises(AdapterError, match="served as the bare base"):
        await hotswap.activate(policy.version)
    assert (hotswap.active_version, fake.adapters) == (0, {})


async def test_an_adapter_that_differs_from_what_was_trained_is_refused(
    hotswap: HotSwap, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
):
    policy = await make_policy()
    monkeypatch.setattr("tests.runtime.fake_engine.base_logprobs", lambda ids: [-9.0] * (len(ids) - 1))
    monkeypatch.setattr("runtime.serving.hotswap.TOLERANCE_NATS", -1.0)
    with pytest.raises(AdapterError, match="not served as it was trained"):
        await hotswap.activate(policy.version)


async def test_a_damaged_adapter_never_reaches_the_engine_and_leaves_the_old_one_on(
    hotswap: HotSwap, memory: Memory, make_policy: MakePolicy, fake: FakeEngine
):
    policy = await make_policy()
    weights = memory.data_dir / "adapters" / "pocket-v1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    following = asyncio.create_task(hotswap.follow())
    await wait_until(lambda: hotswap.active_version == 0)
    await memory.policies.promote(policy.version)
    await wait_until(lambda: hotswap.refusal is not None)
    assert "adapter_model.safetensors" in hotswap.refusal
    assert (hotswap.active_version, fake.ever_loaded) == (0, [])

    sound = await make_policy()
    await memory.policies.promote(sound.version)
    await wait_until(lambda: hotswap.active_version == sound.version)
    assert hotswap.refusal is None
    following.cancel()


async def test_an_adapter_for_another_base_is_refused(hotswap: HotSwap, make_policy: MakePolicy):
    policy = await make_policy(base_digest="of another base")
    with pytest.raises(AdapterError, match="not for the one that is served"):
        async with hotswap.lease(policy.version):
            pass


async def test_a_restarted_engine_loads_the_active_and_the_leased_policies(
    hotswap: HotSwap, make_policy: MakePolicy, fake: FakeEngine
):
    active, leased, idle = [await make_policy() for _ in range(3)]
    async with hotswap.lease(idle.version):
        pass
    await hotswap.activate(active.version)
    async with hotswap.lease(leased.version):
        fake.forget_adapters()
        await hotswap.reload_adapters()
        assert fake.adapters.keys() == {"pocket-v1", "pocket-v2"}
    async with hotswap.lease(idle.version) as leased:
        assert leased.served_name in fake.adapters


async def test_simultaneous_leases_of_a_new_policy_load_it_once(
    hotswap: HotSwap, make_policy: MakePolicy, fake: FakeEngine
):
    policy = await make_policy()

    async def lease_once() -> int:
        async with hotswap.lease(policy.version) as leased:
            return leased.version

    assert await asyncio.gather(*(lease_once() for _ in range(20))) == [policy.version] * 20
    assert fake.ever_loaded == ["pocket-v1"]


async def test_many_swaps_under_many_leases_never_serve_an_unloaded_adapter(
    hotswap: HotSwap, make_policy: MakePolicy, engine: Engine
):
    policies = [await make_policy() for _ in range(5)]
    done = asyncio.Event()

    async def stream() -> int:
        num_calls = 0
        while not done.is_set():
            async with hotswap.lease() as leased:
                for _ in range(3):
                    await leased.complete([{"role": "user", "content": "hi"}])
                    num_calls += 1
        return num_calls

    streams = [asyncio.create_task(stream()) for _ in range(8)]
    for turn in range(20):
        await hotswap.activate(policies[turn % 5].version)
    done.set()
    assert all(num_calls > 0 for num_calls in await asyncio.gather(*streams))
    assert hotswap.num_swaps >= 20
