"""A fused LoRA layer computes what PEFT's does, forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from optimizer.training.fused_lora import fuse_lora

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2, with biases": (Qwen2ForCausalLM, Qwen2Config)}
IDS = torch.arange(24).reshape(2, 12)


def make(family: str, **settings: Any) -> PeftModel:
    """Return a model whose adapters, "default" and "ref", are both trained and differ."""
    torch.manual_seed(0)
    model_class, config_class = FAMILIES[family]
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings})
    model = get_peft_model(model_class(config_class(**SHAPE)), config)
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_adapter("default")
    return model


@contextmanager
def adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    if name is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name)
        yield


def train_once(model: PeftModel, autocast: torch.dtype | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits, and the gradients of what is trained."""
    model.zero_grad()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        logits = model(input_ids=IDS).logits.float()
    (logits * torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)).sum().backward()
    named = model.named_parameters()
    return logits, {name: it.grad.clone() for name, it in named if it.requires_grad and it.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_peft_does(family: str, checkpointing: bool):
    model = make(family)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits, gradients = train_once(model, None)
    fuse_lora(model, torch.float32)
    fused_logits, fused_gradients = train_once(model, None)

    assert torch.allclose(logits, fused_logits, atol=1e-5)
    assert gradients.keys() == fused_gradients.keys() and len(gradients) == 28  # two matrices of seven layers, twice
    for name, gradient in gradients.items():
        assert fused_gradients[name].dtype is torch.float32
        assert (gradient - fused_gradients[name]).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_is_as_near_to_float32_as_peft(family: str):
    model = make(family)
    exact = flatten(train_once(model, None))
    distances = []
    for _ in range(2):
        distances.append((flatten(train_once(model, torch.bfloat16)) - exact).norm() / exact.norm())
        fuse_lora(model, torch.bfloat16)

    of_peft, fused = distances
    assert 0 < fused < 1.2 * of_peft < 0.1


def flatten(trained: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([it.flatten() for it in trained[1].values()])


@pytest.mark.parametrize("name", ["ref", None])
def test_another_adapter_and_none_can_be_in_use(name: str | None):
    model = make("llama")
    with torch.no_grad(), adapter(model, name):
        before = model(input_ids=IDS).logits
        fuse_lora(model, torch.float32)
        assert torch.allclose(before, model(input_ids=IDS).logits, atol=1e-5)
    model.set_adapter("default")
    assert not torch.allclose(before, model(input_ids=IDS).logits, atol=1e-2)


def test_frozen_weights_in_bfloat16_can_be_asked_in_float32():
    model = make("llama")
    fuse_lora(model, torch.bfloat16)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype is torch.bfloat16 and layer.lora_A["default"].weight.dtype is torch.float32
    with torch.no_grad():
        assert model(input_ids=IDS).logits.dtype is torch.float32


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_other_kinds_of_lora_are_refused(settings: dict[str, Any]):
    with pytest.raises(ValueError, match="no plain LoRA"):
        fuse_lora(make("llama", **settings), torch.float32)
