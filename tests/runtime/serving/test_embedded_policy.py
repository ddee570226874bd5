"""The adapter of an embedded model: a new data directory starts with it as an ordinary policy."""

from __future__ import annotations

from pathlib import Path

from memory.store import Memory
from runtime.serving.embedded_policy import install_embedded_policy
from runtime.serving.hotswap import HotSwap
from tests.runtime.conftest import write_adapter


async def test_the_adapter_of_the_program_becomes_policy_v1_and_can_be_rolled_back(
    hotswap: HotSwap, memory: Memory, base_dir: Path, tmp_path: Path
):
    shipped = write_adapter(tmp_path / "shipped", base_dir, 1)
    (shipped / "README.md").write_text("how it was made")
    policy = await install_embedded_policy(memory.policies, memory.data_dir / "adapters", shipped)
    await hotswap.activate(memory.policies.active().version)
    async with hotswap.lease() as leased:
        assert (leased.version, leased.served_name) == (1, "pocket-v1")
    assert Path(policy.adapter_path).parent == memory.data_dir / "adapters"
    assert {path.name for path in Path(policy.adapter_path).iterdir()} == {
        "manifest.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (await memory.policies.rollback()).version == 0


async def test_a_start_that_was_killed_before_the_policy_was_drafted_goes_on(
    hotswap: HotSwap, memory: Memory, base_dir: Path, tmp_path: Path
):
    shipped = write_adapter(tmp_path / "shipped", base_dir, 1)
    (memory.data_dir / "adapters" / "unfinished").mkdir(parents=True)
    write_adapter(memory.data_dir / "adapters" / "pocket-v1", base_dir, 1)
    policy = await install_embedded_policy(memory.policies, memory.data_dir / "adapters", shipped)
    assert memory.policies.active().version == policy.version == 1
