"""The active policy and the legal moves of policies, by example and by a state machine that tries all moves."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memory.errors import IllegalMove, NothingToRollBackTo, OtherBaseModel, UnknownPolicy
from memory.records.policies import Policies
from memory.schema import LEGAL_MOVES, PolicyStage
from memory.storage.database import Database


@pytest.fixture
def policies(database: Database) -> Policies:
    return Policies(database)


async def test_the_base_is_registered_once_and_acts(policies: Policies):
    with pytest.raises(UnknownPolicy, match="register a base first"):
        policies.active()
    base = await policies.register_base("pocket")
    assert (base.version, base.name, base.stage) == (0, "v0", PolicyStage.ACTIVE)
    assert await policies.register_base("pocket") == base
    assert len(policies.activations()) == 1
    with pytest.raises(OtherBaseModel, match="'pocket', not for 'qwen'"):
        await policies.register_base("qwen")


async def test_a_promotion_retires_the_incumbent_and_registering_the_base_again_changes_nothing(policies: Policies):
    await policies.register_base("pocket")
    candidate = await policies.draft(adapter_path="/adapters/a-v1", parent=0, note="sft")
    assert (candidate.version, candidate.base_model, candidate.stage) == (1, "pocket", PolicyStage.DRAFT)
    await policies.move(1, PolicyStage.CANDIDATE)
    await policies.promote(1)
    assert policies.active().version == 1 and policies.get(0).stage is PolicyStage.RETIRED
    assert (await policies.promote(1)).version == 1 and len(policies.activations()) == 2
    await policies.register_base("pocket")
    assert policies.active().version == 1


async def test_rollbacks_lead_back_in_history_not_forth_again(policies: Policies):
    await policies.register_base("pocket")
    for version in (1, 2):
        await policies.draft(parent=version - 1)
        await policies.promote(version)
    assert (await policies.rollback()).version == 1
    assert (await policies.rollback()).version == 0
    with pytest.raises(NothingToRollBackTo):
        await policies.rollback()
    assert [(it.version, it.is_rollback) for it in policies.activations()] == [
        (0, False), (1, False), (2, False), (1, True), (0, True),
    ]  # fmt: skip
    await policies.promote(2)
    assert (await policies.rollback()).version == 0


async def test_the_active_policy_cannot_leave_without_a_successor(policies: Policies):
    await policies.register_base("pocket")
    with pytest.raises(IllegalMove, match="promote another"):
        await policies.move(0, PolicyStage.RETIRED)
    with pytest.raises(IllegalMove, match="'active' to 'rejected'"):
        await policies.move(0, PolicyStage.REJECTED)


async def test_a_verdict_stays_with_the_policy_it_moved(policies: Policies):
    await policies.register_base("pocket")
    await policies.draft()
    await policies.move(1, PolicyStage.CANDIDATE)
    await policies.move(1, PolicyStage.REJECTED, verdict={"outcome": "reject", "difference": -0.1})
    assert policies.get("v1").verdict == {"outcome": "reject", "difference": -0.1}
    await policies.promote(1)
    assert policies.active().version == 1


async def test_lineage_leads_to_the_root(policies: Policies):
    await policies.register_base("pocket")
    await policies.draft(parent=0)
    await policies.draft(parent=1)
    assert [policy.version for policy in policies.lineage("v2")] == [2, 1, 0]
    with pytest.raises(UnknownPolicy, match="version 9"):
        await policies.draft(parent=9)


@pytest.mark.parametrize("name", ["v9", 9, "latest", "v-1", "v\u0661", "", "v99999999999999999999999"])
async def test_an_unknown_policy_is_named(policies: Policies, name):
    with pytest.raises(UnknownPolicy, match=f"v?{str(name).removeprefix('v')}"):
        policies.get(name)


async def test_whoever_waits_is_told_of_a_change_at_once(policies: Policies):
    await policies.register_base("pocket")
    assert await policies.wait_for_change(-1) == 0
    waiting = asyncio.ensure_future(policies.wait_for_change(0))
    await asyncio.sleep(0.01)
    await policies.draft()
    assert not waiting.done()
    await policies.promote(1)
    async with asyncio.timeout(0.5):
        assert await waiting == 1


async def test_a_change_from_elsewhere_is_noticed_by_polling(policies: Policies, database: Database):
    await policies.register_base("pocket")
    await policies.draft()
    waiting = asyncio.ensure_future(policies.wait_for_change(0))
    await Policies(database).promote(1)  # as another replica on the same database does
    async with asyncio.timeout(30):
        assert await waiting == 1


class PolicyMachine(RuleBasedStateMachine):
    """Tries every move on every policy, and compares the result with a simple model."""

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.database = Database(Path(self.directory.name) / "ratchet.db")
        self.policies = Policies(self.database)
        self.runner = asyncio.Runner()
        self.runner.run(self.policies.register_base("pocket"))
        self.stages = {0: PolicyStage.ACTIVE}
        self.history = [0]

    def teardown(self) -> None:
        self.database.close()
        self.runner.close()
        self.directory.cleanup()

    def _activated(self, version: int) -> None:
        active = next(it for it, stage in self.stages.items() if stage is PolicyStage.ACTIVE)
        self.stages[active] = PolicyStage.RETIRED
        self.stages[version] = PolicyStage.ACTIVE

    @precondition(lambda self: len(self.stages) < 5)
    @rule()
    def draft(self) -> None:
        policy = self.runner.run(self.policies.draft())
        assert policy.version == len(self.stages)
        self.stages[policy.version] = policy.stage

    @rule(pick=st.integers(0, 4), stage=st.sampled_from(PolicyStage))
    def move(self, pick: int, stage: PolicyStage) -> None:
        version = pick % len(self.stages)
        here = self.stages[version]
        is_legal = stage in LEGAL_MOVES[here] and here is not PolicyStage.ACTIVE
        try:
            self.runner.run(self.policies.move(version, stage))
        except IllegalMove:
            assert not is_legal
            return
        assert is_legal
        if stage is PolicyStage.ACTIVE:
            self._activated(version)
            self.history.append(version)
        else:
            self.stages[version] = stage

    @rule(pick=st.integers(0, 4))
    def promote(self, pick: int) -> None:
        version = pick % len(self.stages)
        if self.stages[version] is PolicyStage.ACTIVE:
            self.runner.run(self.policies.promote(version))
            return
        assert PolicyStage.ACTIVE in LEGAL_MOVES[self.stages[version]]
        self.runner.run(self.policies.promote(version))
        self._activated(version)
        self.history.append(version)

    @rule()
    def roll_back(self) -> None:
        if len(self.history) == 1:
            with pytest.raises(NothingToRollBackTo):
                self.runner.run(self.policies.rollback())
            return
        self.history.pop()
        assert self.runner.run(self.policies.rollback()).version == self.history[-1]
        self._activated(self.history[-1])

    @invariant()
    def rows_say_what_must_be_true(self) -> None:
        rows = {policy.version: policy.stage for policy in self.policies.select()}
        assert rows == self.stages
        assert list(rows.values()).count(PolicyStage.ACTIVE) == 1
        assert self.policies.active().version == self.history[-1] == self.policies.activations()[-1].version


TestPolicyMachine = PolicyMachine.TestCase
TestPolicyMachine.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
