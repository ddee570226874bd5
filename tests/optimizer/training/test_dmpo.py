"""The variants of DPO's loss: weighted by turns (DMPO), and normalised by length."""

from __future__ import annotations

import hashlib

import pytest
import torch
from pydantic import ValidationError

from optimizer.config import OptimizerConfig, PreferenceConfig
from optimizer.data.preferences import build_preferences
from optimizer.data.rows import read_rows
from optimizer.training import dpo
from optimizer.training.spec import ADDED_LATER, NOT_DIGESTED, TrainingSpec
from tests.optimizer.data.test_masks import (
    LOST,
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
    config = PreferenceConfig(scope="remainder")
    rows = build_preferences(graded, tokenizer, config=config, max_length_tokens=2048).rows
    made = spec("dpo", rows, dtype="float32", **fields)
    return dpo.build_trainer(made, read_rows(made.rows_path))


def test_the_weight_falls_from_turn_to_turn_and_a_side_starts_at_one():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0, 0]])

    weights = dpo.weigh_turns(mask, 0.5)

    first, second, third = 1.0, (0.5 - 0.125) / 0.875, (0.25 - 0.125) / 0.875
    assert weights[0].tolist() == pytest.approx([0, first, first, 0, second, 0, third])
    assert weights[1].tolist() == [0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("discount", "weights"), [(1 - 1e-9, [1, 2 / 3, 1 / 3]), (1e-9, [1, 0, 0])])
def test_the_discount_goes_from_the_first_turn_alone_to_an_even_fall(discount, weights):
    mask = torch.tensor([[1, 0, 1, 0, 1]])

    assert dpo.weigh_turns(mask, discount)[0, ::2].tolist() == pytest.approx(weights, abs=1e-6)


def test_dmpo_feels_only_own_tokens_and_later_turns_less(spec, tokenizer, sft_adapter):
    plain, batch = head_gradient(make_trainer(spec, tokenizer, parent_adapter=sft_adapter))
    weighed, _ = head_gradient(make_trainer(spec, tokenizer, parent_adapter=sft_adapter, loss="dmpo", discount=0.5))

    assert_only_own_tokens_count(weighed, batch["completion_mask"])
    ratio = weighed.norm(dim=-1) / plain.norm(dim=-1)
    weights = dpo.weigh_turns(batch["completion_mask"], 0.5)[:, 1:]
    own = batch["completion_mask"][:, 1:].bool()
    assert torch.allclose(ratio[:, :-1][own], weights[own], rtol=1e-3) and weights[own].unique().numel() > 1


def test_dmpo_measures_both_policies_alike(spec, tokenizer, sft_adapter):
    trainer = make_trainer(spec, tokenizer, parent_adapter=sft_adapter, loss="dmpo", discount=0.5)

    head_gradient(trainer)

    for side in ("chosen", "rejected"):
        assert abs(trainer._metrics["train"][f"rewards/{side}"][0]) < 1e-4


def test_the_length_normalised_form_does_not_weigh_a_longer_side_more(spec, tokenizer, sft_adapter):
    gradient, batch = head_gradient(make_trainer(spec, tokenizer, parent_adapter=sft_adapter, loss="sigmoid_norm"))

    per_side = gradient.norm(dim=-1).sum(dim=1) / batch["completion_mask"].sum(dim=1)
    plain, _ = head_gradient(make_trainer(spec, tokenizer, parent_adapter=sft_adapter))
    ratio = (gradient.norm(dim=-1) / plain.norm(dim=-1)).nanmean(dim=1) * batch["completion_mask"].sum(dim=1)
    assert ratio[0].item() == pytest.approx(ratio[1].item(), rel=1e-2) and (per_side > 0).all()


@pytest.mark.parametrize("fields", [{}, {"loss": "dmpo", "discount": 0.5}])
def test_the_loss_does_not_depend_on_how_many_preferences_fit_into_a_pass(spec, tokenizer, sft_adapter, fields):
    long = [(f"open door {number}", "It is open.") for number in range(3)]
    graded = [
        live(moves, tokenizer=tokenizer, task=task, is_success=moves[0] != LOST[0])
        for task, won in (("a", WON), ("b", WON), ("c", long), ("d", [*long, *WON]))
        for moves in (won, LOST)
    ]
    config = PreferenceConfig(scope="remainder")
    rows = build_preferences(graded, tokenizer, config=config, max_length_tokens=2048).rows
    made = spec("dpo", rows, dtype="float32", parent_adapter=sft_adapter, sft_weight=1.0, **fields)
    trainer = dpo.build_trainer(made, read_rows(made.rows_path))
    measured = list(trainer.train_dataset)

    def loss(*of_pass):
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, trainer.data_collator(list(of_pass))).item()

    assert len(measured) == 4
    assert loss(*measured) == pytest.approx(sum(map(loss, measured)) / len(measured), rel=1e-5)


def test_a_long_chosen_side_is_not_likelier_made_than_a_short_one():
    log_probs = torch.tensor([[-1.0, -1.0, -1.0, -1.0], [0.0, -5.0, 0.0, 0.0], [-9.0] * 4, [-9.0] * 4])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1] * 5, [1] * 5])

    assert dpo.measure_likelihood_loss(log_probs, mask).item() == pytest.approx((1 + 5) / 2)


def test_dmpo_on_single_decisions_is_refused_with_the_mend():
    with pytest.raises(ValidationError, match="set the scope to 'remainder'"):
        OptimizerConfig.model_validate({"preferences": {"loss": "dmpo"}})


def test_the_usual_loss_leaves_the_digest_of_a_training_as_it_was(spec):
    made: TrainingSpec = spec("dpo", [])
    before = made.model_dump_json(exclude={*NOT_DIGESTED, *ADDED_LATER})

    assert made.digest() == hashlib.sha256(before.encode() + made.rows_path.read_bytes()).hexdigest()
    assert made.model_copy(update={"loss": "dmpo", "discount": 0.7}).digest() != made.digest()
