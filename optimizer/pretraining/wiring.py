"""Wires an induction circuit into a Qwen2's initial weights, so that looking things up is there from the first step.

"A B ... A -> B" takes two attention heads in a row (Olsson et al., 2022, arXiv 2209.11895): one in the first layer that
notes at every position the token before it, one later that looks for the position whose note is the token at hand,
and copies the token there. Trained from noise the two must find each other, which took millions of tokens here and
often did not happen at all; wired, they are only refined. Nothing is frozen.

The note is written into a subspace of its own, so that a token is not mistaken for a note. Positions are separated by
the fast rotations of RoPE, through the biases of Qwen2's queries and keys; contents are compared in the slow ones.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

NOTE_GAIN = 0.1
POSITION_GAIN = 8.0
MATCH_GAIN = 2.0
COPY_GAIN = 0.4
NUM_FAST_PAIRS = 6


@torch.no_grad()
def wire_induction(model: Qwen2ForCausalLM, *, num_readers: int = 2, generator: torch.Generator) -> None:
    """Set head 0 of layer 0 to note the previous token, and `num_readers` heads of layer 1 to look notes up."""
    config = model.config
    width, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    token_rows = _orthonormal_rows(head_dim, width, generator)  # the part of a token that is noted
    note_rows = _orthonormal_rows(head_dim, width, generator)  # the subspace of the note
    attentions = [cast("Qwen2Attention", layer.self_attn) for layer in model.model.layers]
    _note_previous_token(attentions[0], head_dim, token_rows, note_rows, config)
    for head in range(num_readers):
        _look_notes_up(attentions[1], head, head_dim, token_rows, note_rows, generator)


def _note_previous_token(
    attention: Qwen2Attention,
    head_dim: int,
    token_rows: torch.Tensor,
    note_rows: torch.Tensor,
    config: Qwen2Config,
) -> None:
    query, key, rope = torch.zeros(head_dim), torch.zeros(head_dim), config.rope_parameters
    assert rope is not None, "Qwen2 rotates its queries and keys"
    half = head_dim // 2
    # transformers rotates dimension `pair` with `pair + half`, not with its neighbour
    for pair in range(NUM_FAST_PAIRS):
        angle = cast(float, rope["rope_theta"]) ** (-pair / half)  # radians per position
        key[pair] = POSITION_GAIN
        # a query turned back by one position: it meets the key of the token before
        query[pair], query[pair + half] = POSITION_GAIN * math.cos(angle), -POSITION_GAIN * math.sin(angle)
    mine = slice(0, head_dim)
    attention.q_proj.bias[mine], attention.k_proj.bias[mine] = query, key
    attention.q_proj.weight[mine] = 0.0
    attention.k_proj.weight[mine] = 0.0
    attention.v_proj.weight[mine] = token_rows
    attention.o_proj.weight[:, mine] = NOTE_GAIN * note_rows.T


def _look_notes_up(
    attention: Qwen2Attention,
    head: int,
    head_dim: int,
    token_rows: torch.Tensor,
    note_rows: torch.Tensor,
    generator: torch.Generator,
) -> None:
    half, start = head_dim // 2, head * head_dim
    # the slow half of the rotations: contents must match at any distance
    slow = [*range(half // 2, half), *range(half + half // 2, head_dim)]
    chosen = torch.randperm(head_dim, generator=generator)[: len(slow)]
    mine = slice(start, start + head_dim)
    attention.q_proj.weight[mine] = 0.0
    attention.k_proj.weight[mine] = 0.0
    for dim, row in zip(slow, chosen.tolist(), strict=True):
        attention.q_proj.weight[start + dim] = MATCH_GAIN * token_rows[row]
        attention.k_proj.weight[start + dim] = MATCH_GAIN * note_rows[row]
    copied = _orthonormal_rows(head_dim, token_rows.shape[1], generator)
    attention.v_proj.weight[mine] = copied
    attention.o_proj.weight[:, mine] = COPY_GAIN * copied.T


def _orthonormal_rows(num_rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, num_rows, generator=generator)).Q.T
