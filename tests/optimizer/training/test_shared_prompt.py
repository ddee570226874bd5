"""Two sides behind one copy of their prompt have the log-probs and gradients that they have apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from trl.trainer.utils import add_fused_lm_head

from optimizer.training import child
from optimizer.training.child import IGNORED
from optimizer.training.dpo import MaskedPreferenceCollator
from optimizer.training.shared_prompt import PER_TOKEN_FIELDS, SharedPromptModel, share_prompts
from tests.optimizer.training.test_fused_lora import SHAPE

OUTPUTS = ("log_probs", "mean_logits", "is_top1")


def row(prompt: int, chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    """Return a preference; ids of 40 and more are another's text within a side."""
    sides = {"chosen": chosen, "rejected": rejected}
    masks = {f"{name}_mask": [int(token < 40) for token in ids] for name, ids in sides.items()}
    return {"prompt_ids": list(range(1, prompt + 1)), "chosen_ids": chosen, "rejected_ids": rejected, **masks}


ROWS = {
    "single replies": [row(12, [3, 4, 5], [6, 7]), row(7, [9], [9, 8, 8, 8])],
    "replies that begin alike": [row(9, [3, 4, 5], [3, 4, 6])],
    "a side that goes on after a tool": [row(5, [3, 41, 42, 5, 6], [6, 41, 7])],
    "replies that begin with another's text": [row(5, [41, 42, 3], [41, 42, 4]), row(3, [41, 3], [43, 3])],
    "a prompt of one token": [row(1, [3, 4], [5])],
}


def make_batch(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = MaskedPreferenceCollator(pad_token_id=0)(rows)
    mask = batch.pop("completion_mask")
    return {**batch, "labels": batch["input_ids"].masked_fill(mask == 0, IGNORED)}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    child.score_own_tokens_only()
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_every_token_has_the_log_prob_and_the_gradient_that_it_has_apart(model: Any, rows: list[dict[str, list[int]]]):
    batch = make_batch(rows)
    gradients = []
    outputs = [called(**batch, fused_lm_head=True) for called in (model, SharedPromptModel(model))]
    apart, shared = outputs
    for name in OUTPUTS:
        assert torch.allclose(getattr(apart, name).float(), getattr(shared, name).float(), atol=1e-5), name
    assert torch.equal(apart.label_mask, shared.label_mask)
    weights = torch.rand(apart.log_probs.shape)
    for each in outputs:
        model.zero_grad()
        (each.log_probs * weights).sum().backward()
        gradients.append([it.grad.clone() for it in model.parameters()])
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(*gradients, strict=True))


def test_a_common_prompt_is_run_once():
    rows = share_prompts(**make_batch([row(12, [3, 4, 5], [6, 7])]))
    # the last token of the prompt opens both sides
    assert rows.input_ids.tolist() == [[*range(1, 13), 3, 4, 5, 12, 6, 7]]
    assert rows.position_ids.tolist() == [[*range(15), 11, 12, 13]]
    assert rows.shift_labels.tolist() == [[IGNORED] * 11 + [3, 4, 5, IGNORED, 6, 7, IGNORED]]


class Counted:
    """A model that keeps how many tokens it was called with."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.num_tokens = model, model.config, 0

    def __call__(self, **inputs: Any) -> Any:
        self.num_tokens = inputs["input_ids"].numel()
        return self.model(**inputs)


def num_tokens_run(model: Any, rows: list[dict[str, list[int]]]) -> int:
    counted = Counted(model)
    SharedPromptModel(counted)(**make_batch(rows), fused_lm_head=True)
    return counted.num_tokens


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, sliding_window=4),
        Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
        Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        LlamaConfig(**SHAPE, attn_implementation="eager"),
    ],
    ids=["a window", "recurrent layers", "experts", "eager attention"],
)
def test_a_model_whose_tokens_meet_otherwise_gets_its_rows_as_they_are(config: PreTrainedConfig):
    model = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, outputs=OUTPUTS)
    assert num_tokens_run(model, ROWS["single replies"]) == 2 * 2 * 15


def test_sides_with_little_in_common_are_run_apart(model: Any):
    early = row(2, [3, *[41] * 20], [4, *[42] * 20])
    assert num_tokens_run(model, [early]) == 2 * 23
    assert num_tokens_run(model, [row(12, [3, 4, 5], [6, 7])]) == 15 + 3


def test_the_fields_that_are_separated_are_those_of_the_fused_head(model: Any):
    outputs = model(**make_batch(ROWS["single replies"]), fused_lm_head=True)
    assert set(PER_TOKEN_FIELDS) <= set(vars(outputs)) and outputs.log_probs.shape == outputs.label_mask.shape
