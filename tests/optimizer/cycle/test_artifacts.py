"""Stored artifacts, and the stages that follow from a position and the configuration."""

from __future__ import annotations

from typing import cast

import pytest

from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.cycle.artifacts import Critiques, CycleArtifacts, RowsSummary, Selection, TrainedAdapter, to_json
from optimizer.cycle.context import CycleContext
from optimizer.cycle.cycle import list_remaining_stages
from optimizer.errors import OptimizerError
from optimizer.seams import Seams
from tests.memory.episodes import HashingEncoder

METHODS = ["sft", "dpo"]
STORED = {
    "pool": "weights learn from 'kitchen' only",
    "needs": [{"name": "demonstrations"}],
    "practice_offset": 64,
    "practice_end": 128,
    "num_practice_rounds": 4,
    "critiques": {"num_asked": 2, "num_failed": 0, "num_skipped": 0, "first_failure": None},
    "demonstrations": {"num_rows": 3, "num_tasks": 2, "tally": {"used": 3}, "teachers": [], "trajectory_ids": ["a"]},
    "sft_version": 4,
    "dpo-1_version": 6,
    "sft": {"policy": 4, "adapter": "/adapters/ratchet-v4", "metrics": {"num_steps": 8}, "settings": {"lora_rank": 8}},
}
"""As stored in an open cycle of the previous release."""


def test_artifacts_that_an_earlier_release_stored_are_read():
    artifacts = CycleArtifacts.read(STORED)
    assert (artifacts.practice_offset, artifacts.practice_end, artifacts.num_practice_rounds) == (64, 128, 4)
    assert artifacts.rows["demonstrations"].counts == {"used": 3} and list(artifacts.rows) == ["demonstrations"]
    assert artifacts.methods == METHODS  # the only ones stored
    assert artifacts.trained["sft"].policy == 4 and artifacts.versions == {"sft": 4, "dpo-1": 6}
    with pytest.raises(ValueError, match="no candidate yet"):
        assert artifacts.candidate_version


def test_what_is_stored_keeps_its_keys():
    for name, model in (("demonstrations", RowsSummary), ("sft", TrainedAdapter), ("critiques", Critiques)):
        assert to_json(model.model_validate(STORED[name])) == STORED[name]
    assert to_json(Selection(num_tasks=2, num_won={"1": 2}, chosen=1)) == {
        "num_tasks": 2,
        "num_won": {"1": 2},
        "chosen": 1,
    }


@pytest.mark.parametrize(
    ("name", "artifact"),
    [("candidat", 3), ("practice_ofset", 64), ("demonstrations", {"num_rows": 3}), ("trained", {})],
)
async def test_an_artifact_under_a_name_that_nothing_reads_is_refused_and_not_stored(tmp_path, name, artifact):
    with Memory.open(tmp_path / "data", encoder=HashingEncoder()) as memory:
        cycle = await memory.cycles.open({})
        context = CycleContext(memory, cast(Seams, None), cycle.id)

        with pytest.raises(TypeError, match=name):
            await context.save_artifacts(candidate=3, **{name: artifact})

        assert memory.cycles.get(cycle.id).artifacts == {}


async def test_what_a_method_stores_under_its_own_names_is_read_again(tmp_path):
    with Memory.open(tmp_path / "data", encoder=HashingEncoder()) as memory:
        cycle = await memory.cycles.open({})
        context = CycleContext(memory, cast(Seams, None), cycle.id)
        rows, trained = RowsSummary(num_rows=3), TrainedAdapter(policy=4)

        await context.save_artifacts(control_rows=rows, control=trained, **{"grpo.2-1_version": 5})

        assert context.artifacts.rows == {"control_rows": rows} and context.artifacts.trained == {"control": trained}
        assert context.artifacts.versions == {"grpo.2-1": 5}


def test_a_cycle_goes_on_at_its_position_with_the_stages_that_its_configuration_needs():
    playing, logged = OptimizerConfig(), OptimizerConfig(explore_episodes=0)
    every = ["collect", "demonstrate", "sft", "explore", "dpo", "evaluate", "settle"]
    assert [stage.name for stage in list_remaining_stages(playing, METHODS, "collect")] == every
    assert [stage.name for stage in list_remaining_stages(logged, METHODS, "sft")] == [
        "sft",
        "dpo",
        "evaluate",
        "settle",
    ]
    assert [stage.name for stage in list_remaining_stages(logged, METHODS, "explore")] == ["dpo", "evaluate", "settle"]
    with pytest.raises(OptimizerError, match="'grpo'"):
        list_remaining_stages(playing, METHODS, "grpo")
