"""Estimates the GPU memory of a LoRA training, and the least that serving the same model takes.

    training = weights + adapter (parameters, gradients, Adam) + activations + LM head + context of CUDA

Pure arithmetic over a model's config.json and the headers of its safetensors files; nothing is loaded. The activations
were derived by counting what PyTorch 2.13 saves for the backward pass of a Qwen2 layer with LoRA under bfloat16
autocast (a test counts it again); the total was not compared with a GPU yet, so `SAFETY` is added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.training.base import read_headers

GIB = 2**30
BFLOAT16, FLOAT32 = 2, 4
ADAM_BYTES = 4 * FLOAT32
"""Per trained parameter: itself, its gradient, and Adam's two moments, all float32 (PEFT keeps adapters so)."""
# TRL 1.16 projects to the vocabulary in tiles (trl.kernels.chunked_logprob), so the logits never exist as a whole.
TILE_TOKENS, TILE_VOCABULARY = 4096, 32_768
BYTES_PER_LOGIT = BFLOAT16 + 2 * FLOAT32
CUDA_CONTEXT_BYTES = GIB
"""CUDA's context, loaded kernels and cuBLAS workspaces of one process."""
SAFETY = 1.1
"""For fragmentation of the allocator, and for parts that the arithmetic overlooks."""
ENGINE_WORKSPACE_BYTES = 2 * GIB
"""Memory of vLLM besides weights, adapters and KV cache: its profiling run, CUDA graphs, the context of CUDA."""


@dataclass(frozen=True)
class LossShape:
    """The parts of a method's loss that its memory depends on."""

    sequences_per_row: int = 1
    """A preference has two: the chosen and the rejected one."""
    has_reference: bool = False
    """A frozen copy of the adapter is kept beside the trained one."""


LIKELIHOOD = LossShape()
UNPAIRED = LossShape(has_reference=True)
PAIRWISE = LossShape(sequences_per_row=2, has_reference=True)
"""The dearest of all: a machine that can train this can train any method."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer that its memory depends on."""

    num_parameters: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    query_width: int
    """Number of attention heads times the size of one."""
    key_width: int
    """The same of the key-value heads."""
    vocab_size: int
    linear_width: int
    """Inputs plus outputs, summed over all linear layers but the LM head: parameters of a LoRA of rank 1."""
    max_position_embeddings: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Return the shape that a config.json describes (the Qwen, Llama and Mistral families; no experts).

        Raises:
            ValueError: the config lacks a size.
        """
        try:
            hidden, inner = config["hidden_size"], config["intermediate_size"]
            layers, heads, vocab = config["num_hidden_layers"], config["num_attention_heads"], config["vocab_size"]
        except KeyError as error:
            raise ValueError(f"config.json does not say {error}; its memory cannot be estimated") from error
        # head_dim is not always hidden / heads: Qwen3 sets its own
        head = config.get("head_dim") or hidden // heads
        queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
        weights = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner
        # Qwen2 has biases on queries, keys and values although its config.json does not say so
        biases = queries + 2 * keys if config.get("model_type") == "qwen2" else 0
        embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return cls(
            num_parameters=layers * (weights + biases + 2 * hidden) + hidden + embeddings,
            hidden_size=hidden,
            intermediate_size=inner,
            num_layers=layers,
            query_width=queries,
            key_width=keys,
            vocab_size=vocab,
            linear_width=layers * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)),
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
        )


def read_shape(base_dir: Path) -> ModelShape:
    """Return the shape of the model in `base_dir`; parameters and widths are counted in its weight files.

    Raises:
        ValueError: no safetensors file, or a config.json that lacks a size.
    """
    shape = ModelShape.from_config(json.loads((base_dir / "config.json").read_text(encoding="utf-8")))
    tensors = read_headers(base_dir)
    # the same layers as PEFT's "all-linear": every matrix but the embeddings and the LM head
    linear = [size for name, size in tensors.items() if len(size) == 2 and "embed" not in name and "head" not in name]
    return ModelShape(
        **vars(shape)
        | {
            "num_parameters": sum(math.prod(size) for size in tensors.values()),
            "linear_width": sum(sum(size) for size in linear),
        }
    )


@dataclass(frozen=True)
class Footprint:
    """Bytes of GPU memory that a training takes at its peak."""

    weights: int
    adapter: int
    activations: int
    lm_head: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.lm_head + self.overhead

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in vars(self).items())
        return f"{self.total / GIB:.1f} GiB ({parts})"


@dataclass(frozen=True)
class Training:
    """The properties of a training that its memory depends on, besides the length of its rows."""

    shape: ModelShape
    loss: LossShape
    lora_rank: int
    gradient_checkpointing: bool
    bytes_per_weight: int = BFLOAT16

    def footprint(self, length_tokens: int, rows_per_pass: int = 1) -> Footprint:
        """Return the peak for rows of at most `length_tokens`, `rows_per_pass` of them in one forward pass."""
        sequences = rows_per_pass * self.loss.sequences_per_row
        tokens = sequences * length_tokens
        # A and B of a layer have rank * inputs and rank * outputs parameters
        num_trained = self.lora_rank * self.shape.linear_width
        reference = FLOAT32 if self.loss.has_reference else 0
        head = min(tokens, TILE_TOKENS) * min(self.shape.vocab_size, TILE_VOCABULARY) * BYTES_PER_LOGIT
        # the attention mask is materialised for padded batches: quadratic in the length
        mask = sequences * length_tokens**2 * BFLOAT16
        sizes = {
            "weights": self.shape.num_parameters * self.bytes_per_weight,
            "adapter": num_trained * (ADAM_BYTES + reference),
            "activations": tokens * self._activations_per_token() + mask,
            "lm_head": head,
        }
        overhead = CUDA_CONTEXT_BYTES + int((SAFETY - 1) * sum(sizes.values()))
        return Footprint(**sizes, overhead=overhead)

    def _activations_per_token(self) -> int:
        """Bytes kept for the backward pass, and the gradients of the layer that it is at."""
        layer = layer_bytes_per_token(self.shape, self.lora_rank) * self.bytes_per_weight // BFLOAT16
        # The gradients of one layer take no more than the activations that it keeps.
        if self.gradient_checkpointing:  # only each layer's input is kept, and one layer is computed again
            return self.shape.num_layers * self.shape.hidden_size * self.bytes_per_weight + 2 * layer
        return (self.shape.num_layers + 1) * layer

    def longest_row(self, budget_bytes: int, limit_tokens: int) -> int:
        """Return the longest row that trains within the budget, at most `limit_tokens`; 0 if none does."""
        # bisection: the footprint must grow with the length, which every term of it does
        return _largest(limit_tokens, lambda length: self.footprint(length).total <= budget_bytes)

    def rows_that_fit(self, budget_bytes: int, length_tokens: int, limit_rows: int) -> int:
        """Return how many rows of that length fit into one pass, a power of two or the limit; at least one."""
        rows = limit_rows
        while rows > 1 and self.footprint(length_tokens, rows).total > budget_bytes:
            # powers of two divide the batches of the recipes, so that a step keeps its number of rows
            # (trainer_arguments)
            rows = 1 << ((rows - 1).bit_length() - 1)  # the next lower power of two
        return rows


def layer_bytes_per_token(shape: ModelShape, lora_rank: int) -> int:
    """Return the bytes that one layer keeps of one token for its backward pass, in bfloat16.

    The two inputs of the hidden size that the LoRA layers share (fused_lora.py); queries, the attention's output, and
    keys and values repeated for every head; the MLP's gate, its product and the two factors of it; the two normalized
    inputs in float32; seven low-rank products.
    """
    in_bfloat16 = 2 * shape.hidden_size + 4 * shape.query_width + 4 * shape.intermediate_size + 7 * lora_rank
    return in_bfloat16 * BFLOAT16 + 2 * shape.hidden_size * FLOAT32


def least_engine_bytes(shape: ModelShape, *, max_model_len: int, max_loras: int, lora_rank: int) -> int:
    """Return the least that serving takes: weights, adapters, attention for one longest sequence, workspace."""
    # keys and values of one sequence; with less, vLLM does not start
    kv_cache = max_model_len * 2 * shape.num_layers * shape.key_width * BFLOAT16
    adapters = max_loras * lora_rank * shape.linear_width * BFLOAT16
    return shape.num_parameters * BFLOAT16 + adapters + kv_cache + ENGINE_WORKSPACE_BYTES


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number from 0 to `limit` for which a falling condition holds."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
