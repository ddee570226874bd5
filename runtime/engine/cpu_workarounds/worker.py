"""Four corrections to vLLM 0.32 on CPUs, loaded into its workers by `--worker-extension-cls`.

1. Rows without an adapter have the index -1 in a batch. vLLM's GPU kernels skip them; its CPU code uses slot -1, which
   is the last one. A call of the base in one batch with others then gets another adapter, without an error (vLLM#48421,
   open), and an evaluation of two policies side by side compares the wrong ones.
2. vLLM's CPU operations copy the adapter's matrices for every token, hundreds of megabytes for one prompt. Here the
   rows of each adapter are multiplied at once.
3. A prompt that is read in several pieces samples a token after each piece, and vLLM then turns a seeded request's
   generator back by an offset, which generators on CPUs do not support: the engine dies.
4. Where the processor has AMX, vLLM's attention uses it without asking Linux for the permission. Unless a large matrix
   product of PyTorch asked before, which small models have none of, the worker dies of an illegal instruction.

Delete each of them when the pinned vLLM has corrected it; tests/runtime/engine/test_cpu_workarounds.py and the tests
marked `engine` show that.
"""

from __future__ import annotations

from functools import wraps

import torch
from vllm.lora.ops import torch_ops
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class WorkerFixes:
    """Makes vLLM's workers import this module; adds nothing to them."""


def shrink(inputs, weights, output, indices, scaling=1.0):
    """Multiply rows (num_rows, width) by the A matrix of each row's adapter; rows without an adapter become zero."""
    rank = weights.shape[-2]
    output[:, :rank] = 0
    for rows, matrix in _rows_by_adapter(weights, indices):
        output[rows, :rank] = scaling * (inputs[rows].to(output.dtype) @ matrix.to(output.dtype).T)


def expand(inputs, weights, output, indices, add_inputs=True):
    """Multiply rows (num_rows, rank) by the B matrix of each row's adapter, and add them to the output."""
    expand_slice(inputs, weights, output, indices, 0, min(weights.shape[-2], output.shape[1]), add_inputs)


def expand_slice(inputs, weights, output, indices, slice_offset, slice_size, add_inputs=True):
    """Like `expand`, for the columns of one of several layers that are computed together."""
    columns = output[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        columns.zero_()
    for rows, matrix in _rows_by_adapter(weights, indices):
        columns[rows] += inputs[rows].to(output.dtype) @ matrix[:slice_size].to(output.dtype).T


def _rows_by_adapter(weights, indices):
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


def _reseed_dropped_rows(bookkeeping):
    """Wrap the bookkeeping after sampling: a partly read prompt restarts its generator from the seed."""

    @wraps(bookkeeping)
    def bookkeeping_without_offsets(self, *arguments, **options):
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
