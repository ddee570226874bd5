"""Trains an adapter on groups of own rollouts: `python -m optimizer.training.grpo spec.json`.

A clipped policy gradient on the agent's own tokens (PPO's surrogate without a critic), normalised by a constant length
(Dr. GRPO, arXiv 2503.20783). The rollouts were played before, by the agent that serves, and come with their advantages.

The policy that the training starts from sampled the rows, and scores them once more before the first step: the ratio of
a step compares like with like. The engine that sampled them computes a little differently, so what it found a token's
probability to be was kept, and each token weighs by the ratio of the two, up to `LARGEST_WEIGHT` (truncated importance
sampling, arXiv 2510.26788). There is no pull towards a reference: clipping and few steps keep the policy near.

Hazard: TRL's own GRPO and RLOO trainers generate by themselves and import vLLM where it is installed, which must stay
out of a trainer's process; only TRL's fused LM head is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import add_fused_lm_head

from optimizer.training import child
from optimizer.training.spec import TrainingSpec

CLIP = 0.2
"""How far the probability of a token may move from the one it was sampled with before its gradient stops."""
LARGEST_WEIGHT = 2.0
"""Of a token that the trainer finds likelier than the engine that sampled it did."""

Score = Callable[[list[int], list[int]], list[float]]
"""(token ids, mask) -> the log-prob of each token but the first; 0 where the mask is 0."""
ComputeAdvantages = Callable[[dict[str, Any], list[float], Score], list[float]]
"""(row, its log-probs, the policy that the training starts from) -> the advantage of each token but the first."""


@dataclass
class RolloutCollator(DataCollatorMixin):
    """Pads rows to one batch. All but the ids have one number for each token but the first."""

    pad_token_id: int
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return ids and their mask, each (num_rows, num_tokens), and the others, each (num_rows, num_tokens - 1)."""
        ids = [torch.tensor(row["input_ids"]) for row in examples]
        return {
            "input_ids": child.pad(ids, self.pad_token_id),
            "attention_mask": child.pad([torch.ones_like(row) for row in ids], 0),
            "own": child.pad([torch.tensor(row["mask"][1:]) for row in examples], 0),
            "advantages": child.pad([torch.tensor(row["advantages"]) for row in examples], 0),
            "old_logps": child.pad([torch.tensor(row["old_logps"]) for row in examples], 0),
            "engine_gaps": child.pad([torch.tensor(row["engine_gaps"]) for row in examples], 0),
        }


class ClippedGradientTrainer(child.WarmStart, Trainer):
    """The clipped surrogate over rows with advantages and the log-probs that they were sampled with."""

    length_tokens: int = 1
    """The constant that the loss of a row is divided by."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clip_shares: list[float] = []
        self._gaps: list[float] = []
        # the loss is normalised above: transformers must divide by the passes of a step, and by nothing else
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a collator's batch, a scalar."""
        own, advantages = inputs["own"], inputs["advantages"]
        logps = score_batch(model, inputs["input_ids"], inputs["attention_mask"], own)
        ratio = torch.exp(logps - inputs["old_logps"])
        surrogate = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        self._clip_shares.append(_mean_over_own((ratio - 1).abs() > CLIP, own))
        gaps = inputs["engine_gaps"]
        # the gap as it is, and not as it is truncated for the weight: a large one is what the figure is there to show
        self._gaps.append(_mean_over_own(gaps.abs(), own))
        weights = torch.exp(gaps.clamp(max=math.log(LARGEST_WEIGHT)))
        # by rows and a constant, not by their tokens: a long row must not count less a token than a short one
        return -(surrogate * weights * own).sum() / (own.size(0) * self.length_tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in (("clip_ratio", self._clip_shares), ("engine_gap", self._gaps)):
            if values:
                logs[name] = sum(values) / len(values)
                values.clear()
        super().log(logs, start_time)


def _mean_over_own(values: torch.Tensor, own: torch.Tensor) -> float:
    return (values * own).sum().item() / max(1, own.sum().item())


def score_batch(model: Any, ids: torch.Tensor, attention_mask: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the log-probs of own tokens, (num_rows, num_tokens - 1) as `own`, and 0 elsewhere; `ids` and
    `attention_mask` are (num_rows, num_tokens). Only own positions are projected to the vocabulary."""
    labels = ids.clone()
    labels[:, 0] = child.IGNORED
    labels[:, 1:][own == 0] = child.IGNORED
    outputs = model(input_ids=ids, attention_mask=attention_mask, labels=labels, use_cache=False, fused_lm_head=True)
    return outputs.log_probs[:, -own.size(1) :]


def build_trainer(spec: TrainingSpec, rows: list[dict[str, Any]]) -> ClippedGradientTrainer:
    """Return the trainer; it starts from `spec.parent_adapter`, or from the bare base when there is none."""
    return prepare_trainer(spec, rows, lambda row, old_logps, score: [row["advantage"]] * len(old_logps))


def prepare_trainer(
    spec: TrainingSpec, rows: list[dict[str, Any]], compute_advantages: ComputeAdvantages
) -> ClippedGradientTrainer:
    """Return a trainer over these rows, with the log-probs that they were sampled with and their advantages."""
    model, tokenizer = child.load_start(spec)
    if (lora := child.choose_lora(spec)) is not None:
        model = get_peft_model(model, lora)
        child.fuse(model, spec)  # before the policy scores its rollouts, which must be rounded as in training
    if spec.gradient_checkpointing:
        model.enable_input_require_grads()  # transformers#42489
    bare: Any = model.get_base_model()
    add_fused_lm_head(bare)
    # max_length belongs to the trainers that tokenize
    arguments = {key: value for key, value in child.trainer_arguments(spec, len(rows)).items() if key != "max_length"}
    trainer = ClippedGradientTrainer(
        model=model,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        data_collator=RolloutCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.length_tokens = max(sum(row["mask"]) for row in rows)
    score = make_score(trainer)
    trainer.train_dataset = Dataset.from_list([_score_row(row, score, compute_advantages) for row in rows])
    return trainer


def make_score(trainer: Trainer) -> Score:
    """Return the function that scores rows with the trainer's policy as it is when it is called."""

    # one row at a time, without padding: the numbers do not depend on the rows beside it
    @torch.no_grad()
    def score(token_ids: list[int], mask: list[int]) -> list[float]:
        assert trainer.model is not None
        ids = torch.tensor([token_ids], device=trainer.accelerator.device)
        own = torch.tensor([mask[1:]], device=ids.device)
        was_training = trainer.model.training
        trainer.model.eval()
        with trainer.accelerator.autocast():
            logps = score_batch(trainer.model, ids, torch.ones_like(ids), own)
        trainer.model.train(was_training)
        return logps[0].float().tolist()

    return score


def _score_row(row: dict[str, Any], score: Score, compute_advantages: ComputeAdvantages) -> dict[str, Any]:
    old_logps = score(row["input_ids"], row["mask"])
    return {
        "input_ids": row["input_ids"],
        "mask": row["mask"],
        "advantages": compute_advantages(row, old_logps, score),
        "old_logps": old_logps,
        "engine_gaps": compare_with_engine(old_logps, row.get("sampled_logps")),
    }


def compare_with_engine(old_logps: Sequence[float], sampled_logps: Sequence[float] | None) -> list[float]:
    """Return, in nats, how much likelier the trainer finds each token but the first than the engine did that sampled
    it; 0 where the engine's log-probs were not kept."""
    if sampled_logps is None:
        return [0.0] * len(old_logps)
    return [ours - theirs for ours, theirs in zip(old_logps, sampled_logps[1:], strict=True)]


if __name__ == "__main__":
    child.main("grpo", build_trainer)
