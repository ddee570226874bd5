"""Trains an adapter on own rollouts that a teacher scores token by token.

Run as `python -m optimizer.training.distill spec.json`.

On-policy distillation (arXiv 2306.13649, 2602.12275): each own token becomes likelier by as much as the teacher finds
it likelier than the policy that sampled it, which follows the gradient of the reverse KL divergence at the sampled
tokens. The teacher is the policy that the training starts from, with the memory segment in its prompt, and stays as it
is: a teacher that moves along can collapse. Departure from the papers: the divergence is estimated by the sampled token
and not summed over the vocabulary, which would keep two vocabularies of logits in memory.
"""

from __future__ import annotations

from typing import Any

from optimizer.training import child, grpo
from optimizer.training.spec import TrainingSpec

LARGEST_ADVANTAGE = 5.0
"""In nats: a token that the teacher would never write must not outweigh all others of a batch."""


def build_trainer(spec: TrainingSpec, rows: list[dict[str, Any]]) -> grpo.ClippedGradientTrainer:
    """Return the trainer; it starts from `spec.parent_adapter`, or from the bare base when there is none."""
    return grpo.prepare_trainer(spec, rows, compare_with_teacher)


def compare_with_teacher(row: dict[str, Any], old_logps: list[float], score: grpo.Score) -> list[float]:
    """Return how much likelier the teacher finds each token but the first than the policy; 0 where it is not own."""
    # the rows end alike: the segment lies in the prompt, ahead of every own token
    shift = len(row["teacher_ids"]) - len(row["input_ids"])
    taught = score(row["teacher_ids"], [0] * shift + row["mask"])[shift:]
    return [
        max(-LARGEST_ADVANTAGE, min(LARGEST_ADVANTAGE, theirs - ours))
        for theirs, ours in zip(taught, old_logps, strict=True)
    ]


if __name__ == "__main__":
    child.main("distill", build_trainer)
