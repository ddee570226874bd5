"""Trains an adapter on demonstrations: `python -m optimizer.training.sft spec.json`.

Rows are token ids with a mask, never text; the loss counts where the mask is 1.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from optimizer.training import child
from optimizer.training.spec import TrainingSpec


class WarmSFTTrainer(child.WarmStart, SFTTrainer):
    """TRL's SFT trainer, whose first step has a learning rate above 0."""


def build_trainer(spec: TrainingSpec, rows: list[dict[str, Any]]) -> WarmSFTTrainer:
    """Return TRL's SFT trainer over pre-tokenized rows; it starts from `spec.parent_adapter`, or from the bare base."""
    model, tokenizer = child.load_start(spec)
    return WarmSFTTrainer(
        model=model,
        args=SFTConfig(
            # packing would put several rows into one sequence; skip_prepare_dataset keeps TRL from tokenizing and from
            # making labels of its own
            **child.trainer_arguments(spec, len(rows)),
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list([label(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=child.choose_lora(spec),
    )


def label(row: dict[str, Any]) -> dict[str, Any]:
    """Return a demonstration as TRL takes it: labels are the token ids where the mask is 1."""
    # not shifted: the model shifts labels itself
    labels = [token if own else child.IGNORED for token, own in zip(row["input_ids"], row["mask"], strict=True)]
    return {"input_ids": row["input_ids"], "labels": labels}


if __name__ == "__main__":
    child.main("sft", build_trainer)
