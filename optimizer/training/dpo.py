"""Trains an adapter on preferences: `python -m optimizer.training.dpo spec.json`.

Rows are token ids with masks, never text. TRL 1.16's DPO trainer counts every token after the prompt, tool output
included, and tokenizes by itself; `MaskedDPOTrainer` and its collator replace exactly that, so that masked tokens have
no loss.

The reference is the adapter as it was when training began: TRL keeps a frozen copy of it, "ref", beside "default".

`spec.loss` may be "sigmoid_norm", TRL's length-normalised form, or "dmpo" (Shi et al. 2024, arXiv 2406.14868), which
weighs the turns of a side. Departure from DMPO: the added likelihood term is weighed by the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from optimizer.training import child
from optimizer.training.shared_prompt import SharedPromptModel
from optimizer.training.spec import TrainingSpec

COLUMNS = ("prompt_ids", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")


@dataclass
class MaskedPreferenceCollator(DataCollatorMixin):
    """Pads rows to one batch, chosen sides first, with a `completion_mask` that is 1 on the agent's own tokens only."""

    pad_token_id: int
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return ids and masks, each (2 * num_rows, num_tokens), and log-probs of the reference, each (num_rows,)."""
        # TRL splits the batch in the middle: all chosen sides first, then all rejected ones
        sides = [(row, side) for side in ("chosen", "rejected") for row in examples]
        ids = [torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]) for row, side in sides]
        masks = [torch.tensor([0] * len(row["prompt_ids"]) + row[f"{side}_mask"]) for row, side in sides]
        batch = {
            "input_ids": child.pad(ids, self.pad_token_id),
            "attention_mask": child.pad([torch.ones_like(row) for row in ids], 0),
            "completion_mask": child.pad(masks, 0),
        }
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            if key in examples[0]:
                batch[key] = torch.tensor([row[key] for row in examples])
        return batch


def weigh_turns(completion_mask: torch.Tensor, discount: float) -> torch.Tensor:
    """Return DMPO's weight of each token, (num_rows, num_tokens): of the turn it lies in, 0 outside of turns.

    The turn t of T weighs (discount^t - discount^T) / (1 - discount^T): 1 for the first, less for each later one. A
    turn is a stretch of the agent's own tokens; a template always writes something between two.
    """
    own = completion_mask.bool()
    is_first = own & ~torch.nn.functional.pad(own, (1, 0))[:, :-1]
    turn = (is_first.cumsum(dim=1) - 1).clamp(min=0)
    num_turns = is_first.sum(dim=1, keepdim=True).clamp(min=1)
    # float64: near 1, the difference to 1 is lost in float32
    base = torch.tensor(discount, dtype=torch.float64, device=own.device)
    last = base**num_turns
    return torch.where(own, (base**turn - last) / (1 - last), 0.0).float()


@dataclass
class WeighedModel:
    """A model whose log-probs are multiplied by one weight for each token but the first, and kept."""

    model: Any
    weights: torch.Tensor | None
    """None: 1 for every token."""
    log_probs: torch.Tensor | None = None
    """Of the last call, both sides; 0 where nothing is trained."""

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        if self.weights is not None:
            outputs.log_probs = outputs.log_probs * self.weights.to(outputs.log_probs.device)
        self.log_probs = outputs.log_probs
        return outputs


def measure_likelihood_loss(log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the chosen sides of each one's mean loss over its own tokens, a scalar, of `log_probs`,
    (2 * num_rows, num_tokens - 1), and `completion_mask`, (2 * num_rows, num_tokens), chosen sides first."""
    # TRL's own term, "sft", is the mean over all tokens of a pass: it would depend on the rows that share one
    chosen, num_tokens = log_probs.chunk(2)[0], completion_mask.chunk(2)[0].sum(dim=1)
    return -(chosen.sum(dim=1) / num_tokens.clamp(min=1)).mean()


class MaskedDPOTrainer(child.WarmStart, DPOTrainer):
    """DPO over pre-tokenized rows with masks on both sides, with the likelihood of the chosen one added."""

    def __init__(
        self, *args: Any, discount: float | None = None, likelihood_weight: float = 0.0, **kwargs: Any
    ) -> None:
        # before TRL's constructor, which computes the reference
        self._discount, self._likelihood_weight = discount, likelihood_weight
        super().__init__(*args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        return super().compute_ref_log_probs(self._weigh(model, inputs), inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        weighed = self._weigh(model, inputs)
        # nobody asks for the outputs: there is no evaluation
        loss = super()._compute_loss(weighed, inputs, False)
        if self._likelihood_weight:
            assert weighed.log_probs is not None
            loss = loss + self._likelihood_weight * measure_likelihood_loss(
                weighed.log_probs, inputs["completion_mask"]
            )
        return loss

    def _weigh(self, model: Any, inputs: dict[str, Any]) -> WeighedModel:
        weights = None if self._discount is None else weigh_turns(inputs["completion_mask"], self._discount)[:, 1:]
        return WeighedModel(SharedPromptModel(model), weights)

    # These methods are hooks of TRL 1.16: pyproject.toml pins trl, and tests/optimizer/data/test_masks.py fails
    # where they vanish.
    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            # transformers drops every column that is not named here before the collator sees it
            self._signature_columns = [*COLUMNS, "length", "ref_chosen_logps", "ref_rejected_logps"]


def build_trainer(spec: TrainingSpec, rows: list[dict[str, Any]]) -> MaskedDPOTrainer:
    """Return the trainer; it starts from `spec.parent_adapter`, or from the bare base when there is none."""
    model, tokenizer = child.load_start(spec)
    return MaskedDPOTrainer(
        model=model,
        args=DPOConfig(
            **child.trainer_arguments(spec, len(rows)),
            beta=spec.beta,
            loss_type=["sigmoid_norm" if spec.loss == "sigmoid_norm" else "sigmoid"],
            # the reference is computed once for all rows, before the first step; the collator passes the numbers on
            precompute_ref_log_probs=True,
        ),
        data_collator=MaskedPreferenceCollator(tokenizer.pad_token_id),
        train_dataset=Dataset.from_list([measure(row) for row in rows]),
        discount=spec.discount,
        # keeps the chosen side from losing probability along with the rejected one
        likelihood_weight=spec.sft_weight,
        processing_class=tokenizer,
        peft_config=child.choose_lora(spec),
    )


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """Return a preference with the length that batches are grouped by."""
    # the longer side: both are padded to it; the same sum as data/rows.py, count_tokens
    length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    return {**{column: row[column] for column in COLUMNS}, "length": length}


def main(kind: str = "dpo") -> None:
    """Train on the preferences of a method, `kind`."""
    child.main(kind, build_trainer, tokens_of=lambda row: row["prompt_ids"] + row["chosen_ids"])


if __name__ == "__main__":
    main()
