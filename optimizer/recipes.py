"""The numbers of a training, chosen by the size of the base: learning rates, batches, LoRA's rank.

`HYPERPARAMETERS` has one entry for each method of learning, and so says which methods there are; `RECIPES` adds what
all methods share. `OptimizerConfig.recipe` overrides single entries.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel


class Hyperparameters(BaseModel, extra="forbid", frozen=True):
    """The part of a recipe that belongs to one method."""

    learning_rate: float
    epochs: float
    batch_size: int
    """Rows in one optimizer step."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""
    sft_weight: float = 0.0
    """DPO: weight of the added likelihood term on the chosen side; keeps `logps/chosen` from falling."""


class Recipe(BaseModel, extra="forbid", frozen=True):
    """Every number a trainer needs that depends on the size of the model."""

    lora_rank: int
    """One of vLLM's ranks: 1, 8, 16, 32, 64, ..."""
    lora_alpha: int
    methods: dict[str, Hyperparameters]
    """By the name of the method."""
    rows_per_pass: int
    """Rows in one forward pass; the rest of a batch is accumulated. On a GPU fewer, if so many do not fit."""
    gradient_checkpointing: bool
    min_steps: int = 0
    """Fewest optimizer steps of one training. With few rows the batch becomes smaller, then there are more epochs."""


BySize = tuple[Hyperparameters, ...]
"""Of a small, a middle and a large base, as `RECIPES` bounds them."""

# Small: measured on models of a few million parameters. Middle: SFT measured on SmolLM2-135M (learning rates of 7e-4 to
# 1e-3, batches of 4); its DPO lies between its neighbours and was not measured. Large: "LoRA Without Regret" for SFT,
# ETO for DPO. KTO, search, GRPO and distillation were not measured.
_DPO: BySize = (
    # at 1e-3 the chosen side became unlikely too, and games ended in prose; with batches of 8 the few pairs of a cycle
    # made too few steps to change a decision (docs/log.md, "DPO depended on luck", "DPO took too few steps")
    Hyperparameters(learning_rate=3e-4, epochs=3, batch_size=4, sft_weight=1.0),
    Hyperparameters(learning_rate=5e-5, epochs=2, batch_size=4, sft_weight=0.2),
    Hyperparameters(learning_rate=1e-5, epochs=1, batch_size=16, sft_weight=0.1),
)
_POLICY_GRADIENT: BySize = (
    Hyperparameters(learning_rate=3e-4, epochs=1, batch_size=32),
    Hyperparameters(learning_rate=1e-4, epochs=1, batch_size=16),
    Hyperparameters(learning_rate=2e-5, epochs=1, batch_size=32),
)
HYPERPARAMETERS: dict[str, BySize] = {
    "sft": (
        Hyperparameters(learning_rate=2e-3, epochs=5, batch_size=8),
        Hyperparameters(learning_rate=7e-4, epochs=2, batch_size=4),
        Hyperparameters(learning_rate=2e-4, epochs=3, batch_size=16),
    ),
    "dpo": _DPO,
    # a label weighs its own row, so there is no chosen side to hold up
    "kto": tuple(numbers.model_copy(update={"sft_weight": 0.0}) for numbers in _DPO),
    "grpo": _POLICY_GRADIENT,
    "distill": _POLICY_GRADIENT,
    "search": _DPO,
}
METHOD_NAMES = tuple(HYPERPARAMETERS)
"""The methods of learning that `optimizer.methods` may name; `cycle/methods.py` describes each."""
FIRST_METHOD = "sft"
"""The method that continues no other of its cycle, so nothing can come before it."""


def _of_size(size: int) -> dict[str, Hyperparameters]:
    return {name: numbers[size] for name, numbers in HYPERPARAMETERS.items()}


RECIPES: tuple[tuple[float, Recipe], ...] = (
    (
        100e6,
        Recipe(lora_rank=16, lora_alpha=32, methods=_of_size(0), rows_per_pass=8, gradient_checkpointing=False),
    ),
    (
        1e9,
        Recipe(
            lora_rank=16,
            lora_alpha=32,
            methods=_of_size(1),
            rows_per_pass=2,
            gradient_checkpointing=False,
            min_steps=40,
        ),
    ),
    (
        float("inf"),
        Recipe(
            lora_rank=32,
            lora_alpha=32,
            methods=_of_size(2),
            rows_per_pass=2,
            gradient_checkpointing=True,
            min_steps=40,
        ),
    ),
)
"""(number of parameters below which it counts, recipe), rising."""


def choose_recipe(num_parameters: int, overrides: dict[str, Any] | None = None) -> Recipe:
    """Return the recipe for a base of `num_parameters`, with single entries replaced by `overrides`: by their name, or
    by `<method>_<name>` for an entry of one method (`sft_epochs`).

    Raises:
        ValueError: an override names no entry of a recipe.
    """
    # the limits rise and the last is infinite: the first that is larger decides, and one always is
    recipe = next(recipe for limit, recipe in RECIPES if num_parameters < limit)
    entries = recipe.model_dump()
    for name, value in (overrides or {}).items():
        method, _, entry = name.partition("_")
        if name in entries and name != "methods":
            entries[name] = value
        elif entry in entries["methods"].get(method, {}):
            entries["methods"][method][entry] = value
        else:
            raise ValueError(
                f"a recipe has no entry {name!r}; there is {', '.join(sorted(entries.keys() - {'methods'}))}, and "
                f"<method>_{', <method>_'.join(Hyperparameters.model_fields)} for {', '.join(METHOD_NAMES)}"
            )
    # validated anew, not copied with `model_copy(update=...)`, which would let wrong types through
    return Recipe.model_validate(entries)


SMALLEST_BATCH = 4
MOST_ADDED_EPOCHS = 2.0
"""Factor: twice the recipe's epochs at the most, however few the rows are."""


def plan_steps(num_rows: int, *, batch_size: int, epochs: float, min_steps: int) -> tuple[int, float]:
    """Return (batch size, epochs) with which `num_rows` make at least `min_steps` optimizer steps, within bounds.

    The batch shrinks first: the same tokens are computed, and LoRA learns no worse with small batches ("LoRA Without
    Regret"). More epochs cost time and learn by heart, so they come second and at most double.
    """

    def num_steps(size: int, times: float) -> int:
        return math.ceil(math.ceil(num_rows / size) * times)

    # a recipe whose batch is below SMALLEST_BATCH keeps it
    while num_steps(batch_size, epochs) < min_steps and batch_size > SMALLEST_BATCH:
        batch_size = max(SMALLEST_BATCH, batch_size // 2)
    if num_steps(batch_size, epochs) < min_steps:
        epochs = min(MOST_ADDED_EPOCHS * epochs, min_steps / math.ceil(num_rows / batch_size))
    return batch_size, epochs
