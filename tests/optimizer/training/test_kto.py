"""The KTO trainer: its masks, and the weights of good and bad rows. TRL's trainer in this process."""

from __future__ import annotations

import pytest
import torch
from trl import KTOTrainer

from optimizer.config import LabelConfig
from optimizer.data.labels import build_labels
from optimizer.data.rows import read_rows
from optimizer.training import kto
from tests.optimizer.data.test_masks import (
    LOST,
    TOOL_OUTPUT,
    WON,
    assert_only_own_tokens_count,
    head_gradient,
    sft_adapter,
    spec,
)
from tests.optimizer.worlds import live

__all__ = ["sft_adapter", "spec"]


def make_trainer(spec, tokenizer, **fields):
    graded = [live(WON, tokenizer=tokenizer), live(LOST, tokenizer=tokenizer, is_success=False)]
    rows = build_labels(graded, tokenizer, config=LabelConfig(), max_length_tokens=2048).rows
    made = spec("kto", rows, **fields)
    return kto.build_trainer(made, read_rows(made.rows_path))


def test_kto_feels_nothing_at_tool_output(spec, tokenizer):
    gradient, batch = head_gradient(make_trainer(spec, tokenizer))

    texts = [tokenizer.decode(row) for row in batch["input_ids"]]
    assert any(TOOL_OUTPUT in text for text in texts) and any("The oven hums." in text for text in texts)
    assert sorted(batch["label"].tolist()) == [False, True]
    assert_only_own_tokens_count(gradient, batch["completion_mask"])


@pytest.mark.parametrize("starts_from_adapter", [True, False])
def test_the_reference_is_the_policy_that_the_training_starts_from(spec, tokenizer, sft_adapter, starts_from_adapter):
    start = {"parent_adapter": sft_adapter} if starts_from_adapter else {}
    trainer = make_trainer(spec, tokenizer, dtype="float32", **start)

    head_gradient(trainer)

    for side in ("chosen", "rejected"):
        assert abs(trainer._metrics["train"][f"rewards/{side}"][0]) < 1e-4


def test_training_parts_good_rows_from_bad_ones(spec, tokenizer):
    trainer = make_trainer(spec, tokenizer, dtype="float32", epochs=8)

    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        trainer.compute_loss(trainer.model, dict(batch))

    assert trainer._metrics["train"]["rewards/margins"][-1] > 0.05


@pytest.mark.parametrize(("num_good", "num_bad"), [(1, 9), (6, 8), (8, 8), (9, 8), (30, 8), (200, 3)])
def test_neither_kind_of_label_drowns_out_the_other(num_good: int, num_bad: int):
    good, bad = kto.weigh_sides([True] * num_good + [False] * num_bad)

    assert 1 - 1e-9 <= good * num_good / (bad * num_bad) <= 4 / 3 + 1e-9
    assert min(good, bad) == 1.0


def test_one_kind_alone_weighs_one():
    assert kto.weigh_sides([True, True]) == kto.weigh_sides([False]) == (1.0, 1.0)


def test_the_hooks_of_kto_that_are_replaced_exist_in_the_pinned_trl():
    for hook in ("_prepare_dataset", "_set_signature_columns_if_needed"):
        assert hook in vars(KTOTrainer)
