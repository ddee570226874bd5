"""Keep the bare base bare on CPUs: a correction to vLLM 0.32, carried into its workers by `--worker-extension-cls`.

vLLM marks the rows of a batch that wear no adapter with the index -1. Its GPU kernels skip them; its CPU code looks
up slot -1, the last one: whoever asks for the base in one batch with others gets the adapter in that slot, silently
(vLLM#48421, open). Evaluations of two policies side by side would compare the wrong things.

Refuses to know anything else of vLLM. Remove it when the pinned version has the fix; a test on the real engine tells.
"""

from __future__ import annotations

from functools import wraps

from vllm.lora.ops import torch_ops
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu


class BareBase:
    """Mixed into vLLM's worker for the sake of this module's import; adds nothing to it."""


def _skip_bare_rows(shrink):
    """Wrap the operation that takes rows (num_rows, hidden) down to an adapter's rank: bare rows become zero there."""

    @wraps(shrink)
    def shrink_dressed_rows(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling=1.0):
        shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        # Zero at the rank is zero after expansion, whichever slot expands it.
        output_tensor[: len(lora_indices_tensor)].masked_fill_((lora_indices_tensor < 0).unsqueeze(-1), 0)

    return shrink_dressed_rows


# `sgmv_shrink`, which prefill and decode both use, finds it in its own module.
lora_ops.bgmv_shrink = _skip_bare_rows(lora_ops.bgmv_shrink)
torch_ops.bgmv_shrink = punica_cpu.bgmv_shrink = lora_ops.bgmv_shrink
