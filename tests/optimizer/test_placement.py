"""The placement of trainings, and the settings that a refusal suggests."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from optimizer.config import OptimizerConfig
from optimizer.errors import TrainingDoesNotFit
from optimizer.placement import Gpu, Hardware, choose_placement
from optimizer.training.footprint import GIB, LIKELIHOOD, PAIRWISE
from tests.optimizer.training.test_footprint import SHAPES

SEVEN_B, HALF_B, SMALL = SHAPES["Qwen2.5-7B"], SHAPES["Qwen2.5-0.5B"], SHAPES["SmolLM2-135M"]


def hardware(*free_gib: float, total_gib: float = 80, share: float | None = 0.85, **more) -> Hardware:
    """Return hardware whose engine uses GPU 0."""
    gpus = [Gpu(str(i), "card", int(total_gib * GIB), int(free * GIB)) for i, free in enumerate(free_gib)]
    return Hardware(gpus, engine_device="0", engine_share=share, max_model_len=32768, **more)


def test_a_7b_beside_an_engine_at_85_percent_is_refused_with_settings_that_work():
    here = hardware(11.5)
    with pytest.raises(TrainingDoesNotFit, match=r"GPU 0 .* 80.0 GiB") as refused:
        choose_placement(OptimizerConfig(), here, SEVEN_B)
    share = float(re.search(r"gpu_memory_utilization = ([\d.]+)", str(refused.value))[1])
    assert 0.4 < share < 0.75 and 'optimizer.gpu = "window"' in str(refused.value)

    mended = replace(here, engine_share=share, gpus=[replace(here.gpus[0], free_bytes=int((0.995 - share) * 80 * GIB))])
    with pytest.raises(TrainingDoesNotFit):  # two percent more would have been too much
        choose_placement(OptimizerConfig(), replace(mended, engine_share=share + 0.02), SEVEN_B)
    placed = choose_placement(
        OptimizerConfig(), replace(mended, gpus=[replace(mended.gpus[0], free_bytes=80 * GIB)]), SEVEN_B
    )
    assert placed.visible_device == "0" and placed.max_length_tokens(PAIRWISE) >= 2048


def test_in_a_window_the_engines_share_counts_as_free():
    placed = choose_placement(OptimizerConfig(gpu="window"), hardware(11.5), SEVEN_B)
    assert placed.visible_device == "0" and placed.budget_bytes == int(11.5 * GIB) + 68 * GIB
    assert placed.max_length_tokens(LIKELIHOOD) > 20_000


def test_a_small_model_shares_the_card_by_default():
    placed = choose_placement(OptimizerConfig(), hardware(11.5), SMALL)
    assert placed.visible_device == "0" and placed.max_length_tokens(PAIRWISE) >= 2048


def test_the_engine_that_restarts_does_not_make_its_room_look_free():
    placed = choose_placement(OptimizerConfig(), hardware(80), SMALL)
    assert placed.budget_bytes == 12 * GIB


def test_another_gpu_is_offered_and_taken_by_its_number():
    here = hardware(11.5, 79)
    with pytest.raises(TrainingDoesNotFit, match=r'optimizer.gpu = "1"'):
        choose_placement(OptimizerConfig(), here, SEVEN_B)
    placed = choose_placement(OptimizerConfig(gpu="1"), here, SEVEN_B)
    assert placed.visible_device == "1" and placed.budget_bytes == 79 * GIB


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(TrainingDoesNotFit, match=r"'7' names no GPU of this machine; there is: 0 \(card\), 1 \(card\)"):
        choose_placement(OptimizerConfig(gpu="7"), hardware(10, 79), SEVEN_B)


def test_a_card_too_small_for_anything_is_said_to_be():
    with pytest.raises(TrainingDoesNotFit, match="use a smaller base model or a GPU with more memory"):
        choose_placement(OptimizerConfig(gpu="window"), hardware(1, total_gib=16), SEVEN_B)


def test_checkpointing_is_offered_where_it_is_enough():
    needs = choose_placement(OptimizerConfig(), hardware(80, share=0), HALF_B).least_bytes
    free = (needs - GIB) / GIB
    with pytest.raises(TrainingDoesNotFit, match="gradient_checkpointing = true"):
        choose_placement(OptimizerConfig(), hardware(free, share=0), HALF_B)
    saving = OptimizerConfig(recipe={"gradient_checkpointing": True})
    assert choose_placement(saving, hardware(free, share=0), HALF_B).visible_device == "0"


def test_no_window_for_an_engine_that_is_not_ours():
    foreign = hardware(11.5, share=None, can_stop_engine=False)
    with pytest.raises(TrainingDoesNotFit, match=r"the one at engine.url cannot be stopped"):
        choose_placement(OptimizerConfig(gpu="window"), foreign, SEVEN_B)
    with pytest.raises(TrainingDoesNotFit) as refused:
        choose_placement(OptimizerConfig(), foreign, SEVEN_B)
    assert "window" not in str(refused.value) and "utilization" not in str(refused.value)


@pytest.mark.parametrize("gpu", ["share", "window", "1"])
def test_without_a_gpu_nothing_changes_but_the_length(gpu: str):
    placed = choose_placement(OptimizerConfig(gpu=gpu), Hardware(max_model_len=1024), SEVEN_B)
    assert placed.visible_device is None
    assert placed.max_length_tokens(PAIRWISE) == placed.max_length_tokens(LIKELIHOOD) == 1024
    assert placed.rows_per_pass(PAIRWISE, 10**6) == placed.recipe.rows_per_pass


def test_training_on_the_cpu_of_a_gpu_machine_asks_for_no_gpu():
    placed = choose_placement(OptimizerConfig(device="cpu"), hardware(0.1), SEVEN_B)
    assert placed.visible_device is None and placed.budget_bytes is None


@pytest.mark.parametrize(
    ("configured", "served", "expected"), [(None, 4096, 4096), (512, 4096, 512), (9999, 4096, 4096), (None, None, 8192)]
)
def test_rows_are_as_long_as_the_engines_context_unless_capped(configured, served, expected):
    config = OptimizerConfig(max_length_tokens=configured)
    assert choose_placement(config, Hardware(max_model_len=served), SMALL).limit_tokens == expected


def test_long_rows_go_through_one_at_a_time():
    placed = choose_placement(OptimizerConfig(gpu="window"), hardware(11.5), SEVEN_B)
    assert placed.rows_per_pass(PAIRWISE, 512) == 2
    assert placed.rows_per_pass(PAIRWISE, placed.max_length_tokens(PAIRWISE)) == 1


def test_a_device_whose_size_is_not_known_is_used_without_arithmetic():
    sliced = replace(hardware(11.5), engine_device="MIG-4711")
    placed = choose_placement(OptimizerConfig(), sliced, SEVEN_B)
    assert placed.visible_device == "MIG-4711" and placed.budget_bytes is None
