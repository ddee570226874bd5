"""The distillation trainer: the policy moves towards its own distribution with memory in the prompt."""

from __future__ import annotations

import pytest
import torch

from memory.adapters import digest_base, verify_adapter
from optimizer.config import RolloutConfig
from optimizer.data.rollouts import build_rollouts
from optimizer.data.rows import read_rows
from optimizer.training import distill, grpo
from optimizer.training.launch import train
from tests.optimizer.data.test_masks import assert_only_own_tokens_count, head_gradient, sft_adapter, spec
from tests.optimizer.data.test_rollouts import with_memory, without

__all__ = ["sft_adapter", "spec"]


def make_trainer(spec, tokenizer, **fields):
    graded = [with_memory(tokenizer), without(tokenizer)]
    rows = build_rollouts(graded, tokenizer, policy=0, config=RolloutConfig(), max_length_tokens=2048).rows
    made = spec("distill", rows, dtype="float32", **fields)
    read = read_rows(made.rows_path)
    return distill.build_trainer(made, read), read


def test_each_own_token_is_scored_by_the_start_with_memory_in_view_and_no_other(spec, tokenizer, sft_adapter):
    trainer, (row,) = make_trainer(spec, tokenizer, parent_adapter=sft_adapter)
    (prepared,) = list(trainer.train_dataset)
    shift = len(row["teacher_ids"]) - len(row["input_ids"])

    taught = grpo.make_score(trainer)(row["teacher_ids"], [0] * shift + row["mask"])

    for position, own in enumerate(row["mask"][1:]):
        expected = taught[position + shift] - prepared["old_logps"][position] if own else 0.0
        assert prepared["advantages"][position] == pytest.approx(expected, abs=1e-3)
    assert any(prepared["advantages"])


def test_distillation_feels_nothing_at_tool_output(spec, tokenizer):
    gradient, batch = head_gradient(make_trainer(spec, tokenizer)[0])

    assert_only_own_tokens_count(gradient, torch.nn.functional.pad(batch["own"], (1, 0)))


def test_training_brings_the_policy_nearer_to_its_teacher(spec, tokenizer, sft_adapter):
    trainer, (row,) = make_trainer(spec, tokenizer, parent_adapter=sft_adapter, epochs=6)
    (prepared,) = list(trainer.train_dataset)

    trainer.train()

    after = grpo.make_score(trainer)(row["input_ids"], row["mask"])
    moved = [new - old for new, old in zip(after, prepared["old_logps"], strict=True)]
    assert sum(step * wanted for step, wanted in zip(moved, prepared["advantages"], strict=True)) > 0


def test_no_token_outweighs_all_others():
    row = {"teacher_ids": [1, 2, 3, 4], "input_ids": [1, 3, 4], "mask": [0, 1, 1]}

    assert distill.compare_with_teacher(row, [-1.0, -90.0], lambda ids, mask: [0.0, -90.0, -1.0]) == [-5.0, 5.0]


async def test_its_process_leaves_an_adapter_that_an_engine_may_load(spec, tokenizer, sft_adapter, tiny_base):
    graded = [with_memory(tokenizer), without(tokenizer)]
    rows = build_rollouts(graded, tokenizer, policy=0, config=RolloutConfig(), max_length_tokens=2048).rows
    made = spec("distill", rows, parent_adapter=sft_adapter, num_threads=1)

    manifest = await train(made)

    verify_adapter(made.output_dir, base_digest=digest_base(tiny_base), max_rank=16)
    assert manifest.metrics["num_steps"] == 1 and manifest.metrics["clip_ratio/first"] == 0.0
