"""The GRPO trainer: a clipped policy gradient over stored rollouts, on the agent's own tokens."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from optimizer.config import GroupConfig
from optimizer.data.groups import build_groups
from optimizer.data.rows import read_rows
from optimizer.training import grpo
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
    rows = build_groups(graded, policy=0, config=GroupConfig(), max_length_tokens=2048).rows
    made = spec("grpo", rows, **fields)
    return grpo.build_trainer(made, read_rows(made.rows_path))


def test_grpo_feels_nothing_at_tool_output(spec, tokenizer):
    gradient, batch = head_gradient(make_trainer(spec, tokenizer))

    assert any(TOOL_OUTPUT in tokenizer.decode(row) for row in batch["input_ids"])
    assert_only_own_tokens_count(gradient, torch.nn.functional.pad(batch["own"], (1, 0)))


def test_the_log_probs_of_the_sampling_policy_are_those_of_the_start(spec, tokenizer, sft_adapter):
    trainer = make_trainer(spec, tokenizer, dtype="float32", parent_adapter=sft_adapter)
    row, score = trainer.train_dataset[0], grpo.make_score(trainer)
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(row["input_ids"][1:])[:, None])[:, 0] * torch.tensor(row["mask"][1:])

    assert torch.allclose(torch.tensor(row["old_logps"]), expected, atol=1e-4)
    with trainer.model.disable_adapter():
        base = score(row["input_ids"], row["mask"])
    assert max(abs(old - bare) for old, bare in zip(row["old_logps"], base, strict=True)) > 1e-3


def test_training_makes_the_better_rollout_likelier_against_the_worse_one(spec, tokenizer):
    trainer = make_trainer(spec, tokenizer, dtype="float32", epochs=6)
    rows, score = list(trainer.train_dataset), grpo.make_score(trainer)

    trainer.train()

    gains = {
        row["advantages"][0] > 0: sum(score(row["input_ids"], row["mask"])) - sum(row["old_logps"]) for row in rows
    }
    assert gains[True] - gains[False] > 0.05


@pytest.mark.parametrize(("advantage", "moved", "is_clipped"), [(1, 1.5, True), (1, 0.5, False), (-1, 0.5, True)])
def test_a_token_that_has_moved_far_enough_gets_no_gradient(spec, tokenizer, advantage, moved, is_clipped):
    trainer = make_trainer(spec, tokenizer, dtype="float32")
    batch = next(iter(trainer.get_train_dataloader()))
    batch["advantages"] = torch.full_like(batch["advantages"], advantage)
    batch["old_logps"] = batch["old_logps"] - math.log(moved)  # `moved` is the ratio of probabilities

    trainer.compute_loss(trainer.model, batch).backward()

    has_gradient = any(it.grad is not None and bool(it.grad.any()) for it in trainer.model.parameters())
    assert has_gradient is not is_clipped


def test_a_token_counts_as_much_less_as_the_engine_found_it_likelier_than_the_trainer(spec, tokenizer):
    assert grpo.compare_with_engine([-1.0, -1.0], None) == [0.0, 0.0]
    gaps = grpo.compare_with_engine([-1.0, -1.0, -1.0], [0.0, -1.0, -1.0 + math.log(2), -9.0])
    assert gaps == pytest.approx([0.0, -math.log(2), 8.0])

    trainer = make_trainer(spec, tokenizer, dtype="float32")
    row = {**trainer.train_dataset[0], "old_logps": [logp - 0.1 for logp in trainer.train_dataset[0]["old_logps"]]}

    def loss(weight):
        weighed = {**row, "engine_gaps": [math.log(weight)] * len(row["engine_gaps"])}
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, trainer.data_collator([weighed])).item()

    assert loss(0.5) == pytest.approx(loss(1.0) / 2) and abs(loss(1.0)) > 1e-3
    assert loss(50.0) == pytest.approx(loss(grpo.LARGEST_WEIGHT))
    logs = {}
    trainer.log(logs)
    # of the five losses: 0.5, 1, 1, 50 and the largest weight
    gaps = [math.log(2), 0, 0, math.log(50), math.log(grpo.LARGEST_WEIGHT)]
    assert logs["engine_gap"] == pytest.approx(sum(gaps) / 5, rel=1e-3)


def test_rows_of_an_engine_whose_log_probs_were_kept_are_weighed_by_them(spec, tokenizer):
    graded = [live(moves, tokenizer=tokenizer, is_success=moves is WON) for moves in (WON, LOST)]
    for each in graded:
        for step in each.steps:
            step.output_logprobs = [-0.01] * len(step.output_token_ids or ())
    rows = build_groups(graded, policy=0, config=GroupConfig(), max_length_tokens=2048).rows

    trainer = grpo.build_trainer(made := spec("grpo", rows, dtype="float32"), read_rows(made.rows_path))

    for row in trainer.train_dataset:
        of_own = [
            (gap, old)
            for gap, old, own in zip(row["engine_gaps"], row["old_logps"], row["mask"][1:], strict=True)
            if own
        ]
        assert all(gap == pytest.approx(old + 0.01, abs=1e-6) for gap, old in of_own)
        assert min(gap for gap, _ in of_own) < -0.1


def test_rows_of_different_lengths_have_a_finite_gap_and_so_has_a_token_that_the_trainer_rules_out(spec, tokenizer):
    trainer = make_trainer(spec, tokenizer, dtype="float32")
    first, second = trainer.train_dataset
    shorter = {name: values[:-3] for name, values in second.items()}
    impossible = grpo.compare_with_engine([-400.0], [0.0, -0.1]) * len(first["engine_gaps"])

    with torch.no_grad():
        trainer.compute_loss(trainer.model, trainer.data_collator([{**first, "engine_gaps": impossible}, shorter]))
    logs = {}
    trainer.log(logs)

    assert 0 < logs["engine_gap"] < 400 and logs["clip_ratio"] == 0


def test_the_loss_does_not_depend_on_how_many_rows_fit_into_a_pass(spec, tokenizer):
    trainer = make_trainer(spec, tokenizer, dtype="float32")
    # 0.1: the policy has changed a little since
    rows = [{**row, "old_logps": [logp - 0.1 for logp in row["old_logps"]]} for row in trainer.train_dataset]

    def loss(*of_pass):
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, trainer.data_collator(list(of_pass))).item()

    assert loss(*rows) == pytest.approx(sum(loss(row) for row in rows) / len(rows), rel=1e-4)
    assert abs(loss(rows[0])) > 1e-3


def test_the_backends_of_trl_that_import_vllm_stay_out():
    assert "trl.trainer.utils" in sys.modules and "trl.generation" not in sys.modules
