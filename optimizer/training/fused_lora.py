"""LoRA layers as one function of three matrix products each, in the dtype of the products.

PEFT's layer copies its input to the adapter's float32 and back, and scales and adds whole activations. On a CPU these
passes over memory take longer than the products of a small model. The values are PEFT's, up to rounding.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.nn import functional


class _LoraProduct(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T for frozen W and b: (num_tokens, num_in) to (num_tokens, num_out), all in one dtype but
    A and B, which are trained in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        down, scaled_up = down.to(x.dtype), (up * scaling).to(x.dtype)
        hidden = x @ down.T  # (num_tokens, rank)
        ctx.save_for_backward(x, weight, down, scaled_up, hidden)
        ctx.scaling = scaling
        return functional.linear(x, weight, bias).addmm_(hidden, scaled_up.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, down, scaled_up, hidden = ctx.saved_tensors
        (of_output,) = gradients
        of_hidden = of_output @ scaled_up
        of_down = (of_hidden.T @ x).float()
        of_up = (of_output.T @ hidden).float() * ctx.scaling
        of_input = (of_output @ weight).addmm_(of_hidden, down) if ctx.needs_input_grad[0] else None
        return of_input, None, None, of_down, of_up, None


def fuse_lora(model: PeftModel, dtype: torch.dtype) -> None:
    """Have all LoRA layers of a model take `_LoraProduct`, and keep their frozen weights in `dtype`, that of the
    products.

    Raises: ValueError for a LoRA with dropout, biases or a variant of it, which is computed otherwise.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear):
            continue
        has_dropout = any(not isinstance(each, torch.nn.Identity) for each in layer.lora_dropout.values())
        base = cast(torch.nn.Linear, layer.base_layer)
        is_linear = type(base) is torch.nn.Linear  # no subclass, and none of quantised weights
        if has_dropout or not is_linear or layer.lora_variant or any(layer.lora_bias.values()):
            raise ValueError(f"{name} is no plain LoRA: it cannot be computed as one product")
        base.weight.data = base.weight.data.to(dtype)
        layer.forward = MethodType(_forward, layer)


def _forward(layer: Linear, x: Tensor) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    base, x = cast(torch.nn.Linear, layer.base_layer), x.to(dtype)
    weight = base.weight.to(dtype)
    bias = None if base.bias is None else base.bias.to(dtype)
    if layer.disable_adapters:
        return functional.linear(x, weight, bias)
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    output = _LoraProduct.apply(x.flatten(0, -2), weight, bias, down, up, layer.scaling[name])
    return output.unflatten(0, x.shape[:-1])
