"""Decides where a training runs, how long its rows may be and how many fit into one pass, before anything is loaded.

On a GPU the arithmetic of `training.footprint` decides; on a CPU only the length of rows is bounded. Hazard: an engine
that is being restarted looks smaller than it is, so its configured share of the GPU counts where that is more than the
memory it holds.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.errors import TrainingDoesNotFit
from optimizer.recipes import Recipe, choose_recipe
from optimizer.training.base import locate_base
from optimizer.training.footprint import (
    BFLOAT16,
    FLOAT32,
    GIB,
    PAIRWISE,
    LossShape,
    ModelShape,
    Training,
    least_engine_bytes,
    read_shape,
)

LEAST_LENGTH_TOKENS = 2048
"""Shorter rows would leave out most episodes: a training that cannot hold one row of this length does not fit."""


@dataclass(frozen=True)
class Gpu:
    """One GPU and what is free on it now."""

    index: str
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Hardware:
    """The GPUs here, and the engine's part of them."""

    gpus: Sequence[Gpu] = ()
    """Those that PyTorch could use; none where only the CPU computes."""
    engine_device: str | None = None
    """The value of CUDA_VISIBLE_DEVICES that shows the engine's (first) GPU; None: there is none."""
    engine_share: float | None = None
    """Which share of its GPU's memory our engine was given; None: the engine is not ours to size."""
    can_stop_engine: bool = True
    max_model_len: int | None = None
    """The engine's context as it is served; None: unknown."""
    max_loras: int = 4

    def find(self, device: str | None) -> Gpu | None:
        return next((gpu for gpu in self.gpus if gpu.index == device), None)


@dataclass(frozen=True)
class Placement:
    """The device that the trainings of one cycle run on, and the memory they may take there."""

    shape: ModelShape
    recipe: Recipe
    limit_tokens: int
    """No row is longer: the engine's context, or less by the configuration."""
    bytes_per_weight: int
    visible_device: str | None = None
    budget_bytes: int | None = None
    """None: no GPU, or one of unknown size; then nothing is bounded by memory."""

    def __str__(self) -> str:
        if self.visible_device is None:
            return "on the CPU"
        size = "of unknown size" if self.budget_bytes is None else f"with {self.budget_bytes / GIB:.1f} GiB for it"
        return f"on GPU {self.visible_device} {size}"

    def training(self, loss: LossShape) -> Training:
        recipe = self.recipe
        return Training(self.shape, loss, recipe.lora_rank, recipe.gradient_checkpointing, self.bytes_per_weight)

    def max_length_tokens(self, loss: LossShape) -> int:
        """Return the length beyond which rows are left out."""
        if self.budget_bytes is None:
            return self.limit_tokens
        return self.training(loss).longest_row(self.budget_bytes, self.limit_tokens)

    def rows_per_pass(self, loss: LossShape, longest_tokens: int) -> int:
        """Return how many rows one forward pass takes, the longest having `longest_tokens`."""
        if self.budget_bytes is None:
            return self.recipe.rows_per_pass
        return self.training(loss).rows_that_fit(self.budget_bytes, longest_tokens, self.recipe.rows_per_pass)

    @property
    def least_bytes(self) -> int:
        """The memory for the dearest method with one row of the least useful length."""
        # PAIRWISE stands for every method of METHODS (cycle/methods.py): a method with a dearer loss must take its
        # place
        return self.training(PAIRWISE).footprint(min(self.limit_tokens, LEAST_LENGTH_TOKENS)).total


async def find_placement(
    memory: Memory, config: OptimizerConfig, inspect_hardware: Callable[[], Awaitable[Hardware]]
) -> Placement:
    """Return the placement of the trainings of a cycle with these settings.

    Raises:
        TrainingDoesNotFit: no device has the memory; the message names the settings with which they would.
        ValueError: the base model's files are not here, or lack a size.
    """
    hardware = await inspect_hardware()

    # in a thread: the headers of all weight files are read, and huggingface_hub may be imported
    def choose() -> Placement:
        return choose_placement(config, hardware, read_shape(locate_base(memory.policies.get(0).base_model)))

    return await asyncio.to_thread(choose)


def choose_placement(config: OptimizerConfig, hardware: Hardware, shape: ModelShape) -> Placement:
    """Return the placement of a model of this shape. Raises TrainingDoesNotFit."""
    if config.gpu == "window" and not hardware.can_stop_engine:
        raise TrainingDoesNotFit(
            "optimizer.gpu = 'window' needs an engine that this server starts; the one at engine.url cannot be "
            "stopped from here: choose 'share' or the number of another GPU"
        )
    # rows are prompts and replies as served, so none is longer than the engine's context; an engine elsewhere may not
    # say how long that is
    lengths = [config.max_length_tokens, hardware.max_model_len or shape.max_position_embeddings]
    on_gpu = config.device != "cpu" and bool(hardware.gpus)
    placement = Placement(
        shape=shape,
        recipe=choose_recipe(shape.num_parameters, config.recipe),
        limit_tokens=min(length for length in lengths if length is not None),
        bytes_per_weight=FLOAT32 if config.dtype == "float32" else BFLOAT16,
    )
    if not on_gpu:
        return placement
    # indices are those of nvidia-smi (CUDA_DEVICE_ORDER in training/launch.py); CUDA's own order may be another
    device = config.gpu if config.gpu.isdecimal() else hardware.engine_device
    gpu = hardware.find(device)
    if gpu is None and config.gpu.isdecimal():
        there = ", ".join(f"{it.index} ({it.name})" for it in hardware.gpus)
        raise TrainingDoesNotFit(f"optimizer.gpu = {config.gpu!r} names no GPU of this machine; there is: {there}")
    # set before the size is known: the trainer must see one GPU in any case
    placement = replace(placement, visible_device=device)
    if gpu is None:  # a MIG slice, or an engine elsewhere: its size is not known
        return placement
    placement = replace(placement, budget_bytes=_budget(gpu, hardware, in_window=config.gpu == "window"))
    assert placement.budget_bytes is not None
    if placement.least_bytes > placement.budget_bytes:
        raise TrainingDoesNotFit(_explain(placement, config, hardware, gpu))
    return placement


def _budget(gpu: Gpu, hardware: Hardware, *, in_window: bool) -> int:
    """Return the memory that a training may take on a GPU."""
    if gpu.index != hardware.engine_device or hardware.engine_share is None:
        return gpu.free_bytes
    # vLLM takes its share of the total memory, not of what is free when it starts
    engine = math.ceil(hardware.engine_share * gpu.total_bytes)
    if in_window:
        # bounded by the total: an engine that is being restarted has left its share in free_bytes already
        return min(gpu.total_bytes, gpu.free_bytes + engine)
    # a restarting engine holds little now and all its share later
    return min(gpu.free_bytes, gpu.total_bytes - engine)


def _explain(placement: Placement, config: OptimizerConfig, hardware: Hardware, gpu: Gpu) -> str:
    """Return a message with the missing memory, and each setting with which the training would fit."""
    need, budget = placement.least_bytes, (placement.budget_bytes or 0) / GIB
    length = min(placement.limit_tokens, LEAST_LENGTH_TOKENS)
    footprint = placement.training(PAIRWISE).footprint(length)
    mends = list(_list_mends(placement, config, hardware, gpu, need))
    mend = "set " + ", or ".join(mends) if mends else "use a smaller base model or a GPU with more memory"
    return (
        f"training this model on rows of {length} tokens takes about {footprint}; GPU {gpu.index} ({gpu.name}, "
        f"{gpu.total_bytes / GIB:.1f} GiB) has {budget:.1f} GiB for it with optimizer.gpu = {config.gpu!r}: {mend}"
    )


def _list_mends(
    placement: Placement, config: OptimizerConfig, hardware: Hardware, gpu: Gpu, need: int
) -> Sequence[str]:
    mends: list[str] = []
    is_engines = gpu.index == hardware.engine_device and hardware.engine_share is not None
    if is_engines and config.gpu != "window":
        share = suggest_engine_share(placement, hardware, gpu, need)
        if share is not None:
            mends.append(f"engine.gpu_memory_utilization = {share:.2f}")
        if hardware.can_stop_engine and _budget(gpu, hardware, in_window=True) >= need:
            mends.append('optimizer.gpu = "window" (the engine is stopped while training runs)')
    mends += [
        f'optimizer.gpu = "{other.index}"'
        for other in hardware.gpus
        if other.index != gpu.index and _budget(other, hardware, in_window=False) >= need
    ]
    if not placement.recipe.gradient_checkpointing:
        saving = replace(placement, recipe=placement.recipe.model_copy(update={"gradient_checkpointing": True}))
        if saving.least_bytes <= (placement.budget_bytes or 0):
            mends.append("optimizer.recipe = { gradient_checkpointing = true }")
    return mends


def suggest_engine_share(placement: Placement, hardware: Hardware, gpu: Gpu, need: int) -> float | None:
    """Return the largest share of the GPU that leaves enough memory for the training; None if serving needs more."""
    shape, recipe = placement.shape, placement.recipe
    context = hardware.max_model_len or shape.max_position_embeddings
    # never below 0: a restarting engine holds less than its share
    others = max(0, gpu.total_bytes - gpu.free_bytes - math.ceil((hardware.engine_share or 0) * gpu.total_bytes))
    # rounded down, to the two digits that the message shows: rounded up, it would not fit
    share = math.floor(100 * (gpu.total_bytes - need - others) / gpu.total_bytes) / 100
    least = least_engine_bytes(shape, max_model_len=context, max_loras=hardware.max_loras, lora_rank=recipe.lora_rank)
    return share if share * gpu.total_bytes >= least else None
