"""Three corrections to vLLM 0.32 on CPUs, carried into its workers by `--worker-extension-cls`.

The bare base stays bare. vLLM marks the rows of a batch that wear no adapter with the index -1. Its GPU kernels skip
them; its CPU code looks up slot -1, the last one: whoever asks for the base in one batch with others gets the adapter
in that slot, silently (vLLM#48421, open). Evaluations of two policies side by side would compare the wrong things.

An adapter costs what its few numbers cost. vLLM's CPU operations gather a copy of the adapter's matrices for every
token, hundreds of megabytes for a prompt; here each adapter's rows are multiplied at once.

A seeded request does not kill the engine. A prompt that is read in several pieces samples a token after each and
drops all but the last; vLLM then turns the request's generator back by an offset, which generators on CPUs do not
have.

Refuses to know anything else of vLLM. Remove what the pinned version has mended; tests on the real engine tell.
"""

from __future__ import annotations

from functools import wraps

from vllm.lora.ops import torch_ops
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class WorkerFixes:
    """Mixed into vLLM's worker for the sake of this module's import; adds nothing to it."""


def shrink(inputs, weights, output, indices, scaling=1.0):
    """Take rows (num_rows, width) down to the rank of the adapter that each wears; bare rows become zero."""
    rank = weights.shape[-2]
    output[:, :rank] = 0
    for rows, matrix in _rows_by_adapter(weights, indices):
        output[rows, :rank] = scaling * (inputs[rows].to(output.dtype) @ matrix.to(output.dtype).T)


def expand(inputs, weights, output, indices, add_inputs=True):
    """Take rows (num_rows, rank) up to the width of the output, and add them to it."""
    expand_slice(inputs, weights, output, indices, 0, min(weights.shape[-2], output.shape[1]), add_inputs)


def expand_slice(inputs, weights, output, indices, slice_offset, slice_size, add_inputs=True):
    """Like `expand`, for the columns of one of several layers that are computed together."""
    columns = output[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        columns.zero_()
    for rows, matrix in _rows_by_adapter(weights, indices):
        columns[rows] += inputs[rows].to(output.dtype) @ matrix[:slice_size].to(output.dtype).T


def _rows_by_adapter(weights, indices):
    """Yield (which rows, their matrix) for every adapter that is worn in this batch."""
    for slot in indices.unique().tolist():
        if slot >= 0:
            rows = (indices == slot).nonzero().squeeze(1)
            yield rows, weights[slot].reshape(weights.shape[-2:])


# The operations for segments, which prefill uses, find these three in their own module.
for home in (lora_ops, torch_ops, punica_cpu):
    home.bgmv_shrink, home.bgmv_expand, home.bgmv_expand_slice = shrink, expand, expand_slice


def _turn_generators_back(book):
    """Wrap the bookkeeping after sampling: what was drawn for a half-read prompt is drawn again, from the seed."""

    @wraps(book)
    def book_without_offsets(self, *arguments, **options):
        generators = self.input_batch.generators
        is_dropped = self.discard_request_mask.np
        dropped = {row: generators.pop(row) for row in list(generators) if is_dropped[row]}
        for generator in dropped.values():
            generator.manual_seed(generator.initial_seed())
        try:
            return book(self, *arguments, **options)
        finally:
            generators.update(dropped)

    return book_without_offsets


GPUModelRunner._bookkeeping_sync = _turn_generators_back(GPUModelRunner._bookkeeping_sync)
