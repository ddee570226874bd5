"""Trains an adapter on labels, good and bad rows without pairs: `python -m optimizer.training.kto spec.json`.

Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306) over pre-tokenized rows; masked tokens have
no loss. The reference is the adapter as it was when training began, or the bare base.

Departure from the paper: the reference point z0 is 0 (TRL's `apo_zero_unpaired`, arXiv 2408.06266). The paper estimates
z0 from the rows that happen to share a forward pass, so the training would depend on how many rows the GPU holds, which
a spec's digest leaves out; and a reply with tool output in it makes no sense behind another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from optimizer.training import child
from optimizer.training.spec import TrainingSpec

COLUMNS = ("input_ids", "mask", "is_desirable")
LARGEST_RATIO = 4 / 3
"""Of the weight of all good rows to that of all bad ones; the smallest is 1 (equation 8 of the paper)."""


@dataclass
class LabelCollator(DataCollatorMixin):
    """Pads rows to one batch with a `completion_mask` that is 1 on the agent's own tokens only."""

    pad_token_id: int
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return ids and masks, each (num_rows, num_tokens), and labels and log-probs of the reference, each
        (num_rows,)."""
        ids = [torch.tensor(row["input_ids"]) for row in examples]
        batch = {
            "input_ids": child.pad(ids, self.pad_token_id),
            "attention_mask": child.pad([torch.ones_like(row) for row in ids], 0),
            "completion_mask": child.pad([torch.tensor(row["mask"]) for row in examples], 0),
            "label": torch.tensor([row["is_desirable"] for row in examples]),
        }
        if "ref_logps" in examples[0]:
            batch["ref_logps"] = torch.tensor([row["ref_logps"] for row in examples])
        return batch


class MaskedKTOTrainer(child.WarmStart, KTOTrainer):
    """KTO over pre-tokenized rows with masks."""

    # Both methods are private hooks of TRL 1.16: pyproject.toml pins trl, and tests/optimizer/training/test_kto.py
    # fails where they vanish.
    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            # transformers drops every column that is not named here before the collator sees it
            self._signature_columns = [*COLUMNS, "ref_logps"]


def weigh_sides(are_desirable: Sequence[bool]) -> tuple[float, float]:
    """Return the weights (of a good row, of a bad row) with which neither kind drowns out the other.

    The kind that weighs too little in all gets the larger weight, so that weight_good * num_good is between 1 and 4/3
    times weight_bad * num_bad (equation 8 of the paper). One kind alone has the weight 1.
    """
    num_good = sum(are_desirable)
    num_bad = len(are_desirable) - num_good
    if not num_good or not num_bad:
        return 1.0, 1.0
    ratio = num_good / num_bad
    return max(1.0, 1 / ratio), max(1.0, ratio / LARGEST_RATIO)


def build_trainer(spec: TrainingSpec, rows: list[dict[str, Any]]) -> MaskedKTOTrainer:
    """Return the trainer; it starts from `spec.parent_adapter`, or from the bare base when there is none."""
    model, tokenizer = child.load_start(spec)
    good_weight, bad_weight = weigh_sides([row["is_desirable"] for row in rows])
    return MaskedKTOTrainer(
        model=model,
        args=KTOConfig(
            **child.trainer_arguments(spec, len(rows)),
            beta=spec.beta,
            loss_type="apo_zero_unpaired",
            desirable_weight=good_weight,
            undesirable_weight=bad_weight,
            # the reference is computed once for all rows, before the first step; the collator passes the numbers on
            precompute_ref_log_probs=True,
        ),
        data_collator=LabelCollator(tokenizer.pad_token_id),
        train_dataset=Dataset.from_list([{column: row[column] for column in COLUMNS} for row in rows]),
        processing_class=tokenizer,
        peft_config=child.choose_lora(spec),
    )


if __name__ == "__main__":
    child.main("kto", build_trainer)
