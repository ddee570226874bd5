"""Four corrections to vLLM 0.32 on CPUs, loaded into its workers by `--worker-extension-cls`.

1. Rows without an adapter have the index -1 in a batch. vLLM's GPU kernels skip them; its CPU code uses slot -1, which
   is the last one. A call of the base in one batch with others then gets another adapter, without an error (vLLM#48421,
   open), and an evaluation of two policies side by side compares the wrong ones.
2. vLLM's CPU operations copy the adapter's matrices for every token, hundreds of megabytes for one prompt. Here the
   rows of each adapter are multiplied at once; which rows those are is found once a step, not once a layer, and a
   layer's matrices are joined once an adapter.
3. A prompt that is read in several pieces samples a token after each piece, and vLLM then turns a seeded request's
   generator back by an offset, which generators on CPUs do not support: the engine dies.
4. Where the processor has AMX, vLLM's attention uses it without asking Linux for the permission. Unless a large matrix
   product of PyTorch asked before, which small models have none of, the worker dies of an illegal instruction.

Delete each of them when the pinned vLLM has corrected it; tests/runtime/engine/test_cpu_workarounds.py and the tests
marked `engine` show that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops import torch_ops
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

Stacked = tuple[torch.Tensor, ...]
"""The matrices of a layer's slices, each (num_slots, 1, rows, columns)."""
SlotRows = tuple[int, torch.Tensor | None]
"""(slot, indices of its rows); None for all rows."""


class WrapperWithRows(punica_cpu.PunicaWrapperCPU):
    """`PunicaWrapperCPU` after the corrections below."""

    rows_by_slot: Sequence[SlotRows]
    sampled_by_slot: Sequence[SlotRows]


class WorkerFixes:
    """Makes vLLM's workers import this module; adds nothing to them."""


def shrink(
    inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, scaling: float = 1.0
) -> None:
    """Multiply rows (num_rows, width) by the A matrix of each row's adapter; rows without an adapter become zero."""
    rank = weights.shape[-2]
    output[:, :rank] = 0
    for rows, matrix in _rows_by_adapter(weights, indices):
        output[rows, :rank] = scaling * (inputs[rows].to(output.dtype) @ matrix.to(output.dtype).T)


def expand(
    inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, add_inputs: bool = True
) -> None:
    """Multiply rows (num_rows, rank) by the B matrix of each row's adapter, and add them to the output."""
    expand_slice(inputs, weights, output, indices, 0, min(weights.shape[-2], output.shape[1]), add_inputs)


def expand_slice(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Like `expand`, for the columns of one of several layers that are computed together."""
    columns = output[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        columns.zero_()
    for rows, matrix in _rows_by_adapter(weights, indices):
        columns[rows] += inputs[rows].to(output.dtype) @ matrix[:slice_size].to(output.dtype).T


FEW_ROWS = 16
"""Up to so many rows are multiplied in float32: PyTorch's bfloat16 product takes 27 µs to begin, its float32 one 4, and
one token passes 240 of them. With more rows the product itself counts, and bfloat16 is faster."""


def add_lora_linear(
    self: WrapperWithRows,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: Stacked,
    lora_b_stacked: Stacked,
    scale: float,
    output_slices: tuple[int, ...],
    *,
    buffer: object = None,
    **options: object,
) -> None:
    """Add to `y`, (num_rows, width), what each row's adapter makes of `x`, (num_rows, inner width).

    `y` has the columns of several layers side by side, one slice each. Takes the place of the method of
    `PunicaWrapperCPU`.
    """
    _add_products(y, x, lora_a_stacked, lora_b_stacked, scale, self.rows_by_slot)


def add_lora_logits(
    self: WrapperWithRows,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: torch.Tensor,
    lora_b_stacked: torch.Tensor,
    scale: float,
    *,
    buffer: object = None,
    **options: object,
) -> None:
    """Like `add_lora_linear`, for the projection of the rows that are sampled from to the vocabulary."""
    _add_products(y, x, (lora_a_stacked,), (lora_b_stacked,), scale, self.sampled_by_slot)


def _add_products(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: Stacked,
    lora_b_stacked: Stacked,
    scale: float,
    rows_by_slot: Sequence[SlotRows],
) -> None:
    for slot, rows in rows_by_slot:
        inputs = x if rows is None else x[rows]
        dtype = torch.float32 if len(inputs) <= FEW_ROWS else x.dtype
        matrices = _join(lora_a_stacked, lora_b_stacked, slot, dtype)
        if matrices is None:
            continue
        down, up = matrices
        product = inputs.to(dtype) @ down @ up
        if scale != 1.0:  # of 0.32: vLLM scales an adapter when it is loaded
            product *= scale
        # narrower for logits: vLLM pads the vocabulary of `y` to a multiple of 64
        y_part = y[:, : product.size(1)]
        if rows is None:
            y_part += product
        else:
            y_part.index_add_(0, rows, product.to(y.dtype))


_joined: dict[tuple[int, int, torch.dtype], tuple[torch.Tensor, torch.Tensor] | None] = {}
"""(Address of a layer's first matrix, slot, type) -> its A and B matrices as `_join` returns them."""


def _join(
    lora_a_stacked: Stacked, lora_b_stacked: Stacked, slot: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the A matrices of a layer's slices as one, (inner width, ranks), and the B matrices, (ranks, width).

    None where the adapter leaves this layer alone. What takes time with few rows is to begin an operation, so two
    products replace two for each slice; the zeros beside the blocks of the second cost less. A slot is as wide as the
    highest rank that the server allows: the rows that this adapter does not fill are left out.
    """
    key = (lora_a_stacked[0].data_ptr(), slot, dtype)
    if key not in _joined:
        downs, ups = [], []
        for down, up in zip(lora_a_stacked, lora_b_stacked, strict=True):
            filled = down[slot, 0].any(dim=1)
            downs.append(down[slot, 0][filled])
            ups.append(up[slot, 0][:, filled])
        down, up = torch.cat(downs).T.to(dtype), torch.block_diag(*ups).T.to(dtype)
        _joined[key] = (down.contiguous(), up.contiguous()) if len(up) else None
    return _joined[key]


def _forget_copies(change: Callable[..., bool | None]) -> Callable[..., bool | None]:
    """Wrap a change of the matrices in the slots: the joined copies are made anew."""

    @wraps(change)
    def change_and_forget(self: LoRAModelManager, *arguments: object, **options: object) -> bool | None:
        has_changed = True
        try:
            has_changed = change(self, *arguments, **options)
            return has_changed
        finally:
            # vLLM activates the adapters of a batch at every step; False: they lie in their slots already
            if has_changed is not False:
                _joined.clear()

    return change_and_forget


def _find_rows(update: Callable[..., None]) -> Callable[..., None]:
    """Wrap the update of a step's metadata: it also finds the rows of each adapter."""

    @wraps(update)
    def update_and_find_rows(self: WrapperWithRows, *arguments: object, **options: object) -> None:
        update(self, *arguments, **options)
        self.rows_by_slot = _list_rows(self.token_lora_indices)
        self.sampled_by_slot = _list_rows(self.sampler_indices)

    return update_and_find_rows


def _list_rows(indices: torch.Tensor) -> list[SlotRows]:
    """Return (slot, row indices) of every adapter; None for all rows, the usual case, in which nothing is copied."""
    slots = indices.unique().tolist()
    # slot -1 has no adapter
    return [(slot, None if len(slots) == 1 else (indices == slot).nonzero().squeeze(1)) for slot in slots if slot >= 0]


def _rows_by_adapter(weights: torch.Tensor, indices: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (row indices, matrix) for every adapter in this batch."""
    # Loops over the adapters of a batch, not over its rows. `tolist` would wait for the device on a GPU.
    for slot in indices.unique().tolist():
        if slot >= 0:
            rows = (indices == slot).nonzero().squeeze(1)
            yield rows, weights[slot].reshape(weights.shape[-2:])


# In every module that holds them: vLLM's segment operations, used for prefill, call those of their own module.
for module in (lora_ops, torch_ops, punica_cpu):
    for name, operation in (("shrink", shrink), ("expand", expand), ("expand_slice", expand_slice)):
        setattr(module, f"bgmv_{name}", operation)


for method in (add_lora_linear, add_lora_logits):
    setattr(punica_cpu.PunicaWrapperCPU, method.__name__, method)
punica_cpu.PunicaWrapperCPU.update_metadata = _find_rows(punica_cpu.PunicaWrapperCPU.update_metadata)
for name in ("rows_by_slot", "sampled_by_slot"):  # attributes that it lacks; until the first step
    setattr(punica_cpu.PunicaWrapperCPU, name, ())
for change in ("activate_adapter", "_deactivate_adapter", "remove_all_adapters"):
    setattr(LoRAModelManager, change, _forget_copies(getattr(LoRAModelManager, change)))


def _reseed_dropped_rows(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the bookkeeping after sampling: a partly read prompt restarts its generator from the seed."""

    @wraps(bookkeeping)
    def bookkeeping_without_offsets(self: GPUModelRunner, *arguments: object, **options: object) -> Any:
        generators = self.input_batch.generators
        is_dropped = self.discard_request_mask.np
        # Removed for the call, so that vLLM finds no generator to turn back for these rows.
        dropped = {row: generators.pop(row) for row in list(generators) if is_dropped[row]}
        for generator in dropped.values():
            generator.manual_seed(generator.initial_seed())
        try:
            return bookkeeping(self, *arguments, **options)
        finally:
            generators.update(dropped)

    return bookkeeping_without_offsets


GPUModelRunner._bookkeeping_sync = _reseed_dropped_rows(GPUModelRunner._bookkeeping_sync)

if torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()  # for this process and those that it starts
