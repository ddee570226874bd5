"""Scores both sides of a preference with one copy of their common prompt, which is most of either.

A pair becomes one sequence, the chosen side and then the end of the rejected one, whose tokens see the common prompt
and themselves alone, at the positions that they have in their own row (Wang and Hegde 2024, arXiv 2410.20305).
Hazard: a mask of four dimensions replaces whatever else a model attends by, such as a window, and a recurrent layer or
a router never sees it. So only families that are known to attend by it alone share; others get their rows as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from optimizer.training.child import IGNORED

SHARING_FAMILIES = frozenset({"llama", "qwen2", "qwen3", "mistral", "ministral"})
"""`model_type` of models whose tokens meet in full attention and nowhere else, unless their configuration has a
window."""
PER_TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
"""Of the output of TRL's fused head."""


@dataclass(frozen=True)
class SharedRows:
    """Pairs as one sequence each."""

    input_ids: Tensor
    """(num_pairs, num_tokens)"""
    attention_mask: Tensor
    """(num_pairs, 1, num_tokens, num_tokens), True where a query may attend to a key."""
    position_ids: Tensor
    """(num_pairs, num_tokens)"""
    shift_labels: Tensor
    """(num_pairs, num_tokens): the token that each position predicts; `IGNORED` where none is scored."""
    origins: Tensor
    """(2 * num_pairs, row_length - 1): where the prediction of each token stands among all positions of `input_ids`;
    behind the last of them for those that are not scored."""

    def separate(self, values: Tensor) -> Tensor:
        """Return one value per position, (num_pairs, num_tokens), as TRL returns it for rows: (2 * num_pairs,
        row_length - 1), chosen sides first, 0 where nothing is scored."""
        return torch.cat([values.flatten(), values.new_zeros(1)])[self.origins]


def share_prompts(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SharedRows:
    """Return the rows of a batch, each tensor (2 * num_pairs, row_length), chosen sides first, padded on the right."""
    num_pairs, row_length = len(input_ids) // 2, input_ids.size(1)
    lengths = attention_mask.sum(dim=1).tolist()
    pairs = [(row, row + num_pairs) for row in range(num_pairs)]
    # The last common token opens both sides, because it predicts the first token of either.
    starts = [max(0, _count_common(input_ids, labels, *pair, lengths) - 1) for pair in pairs]
    num_tokens = max(lengths[one] + lengths[two] - start for (one, two), start in zip(pairs, starts, strict=True))
    shape, device = (num_pairs, num_tokens), input_ids.device
    ids, shift_labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    positions = torch.arange(num_tokens).repeat(num_pairs, 1)
    # made where it is used: of 16,000 tokens it is 268 MB
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril().repeat(num_pairs, 1, 1, 1)
    origins = torch.full((2 * num_pairs, row_length - 1), num_pairs * num_tokens)
    for (one, two), start in zip(pairs, starts, strict=True):
        middle, end = lengths[one], lengths[one] + lengths[two] - start
        ids[one, :middle], ids[one, middle:end] = input_ids[one, :middle], input_ids[two, start : lengths[two]]
        # Padding behind the end gets no position beyond a row's: some embeddings depend on the largest one.
        positions[one, middle:] = torch.arange(start, start + num_tokens - middle).clamp(max=row_length - 1)
        # What follows sees the common tokens before `start`, and itself.
        mask[one, :, middle:, start:middle] = False
        first = one * num_tokens
        for row, begin, offset in ((one, 0, 0), (two, start, middle - start)):
            predicting = torch.arange(begin, lengths[row] - 1)
            shift_labels[one, predicting + offset] = labels[row, predicting + 1].cpu()
            origins[row, predicting] = first + predicting + offset
    return SharedRows(*(made.to(device) for made in (ids, mask, positions, shift_labels, origins)))


def _count_common(input_ids: Tensor, labels: Tensor, one: int, two: int, lengths: list[int]) -> int:
    """Return the number of first tokens that two rows share and that neither is trained on."""
    limit = min(lengths[one], lengths[two])
    differs = input_ids[one, :limit] != input_ids[two, :limit]
    is_scored = (labels[one, :limit] != IGNORED) | (labels[two, :limit] != IGNORED)
    ends = (differs | is_scored).nonzero()
    return int(ends[0]) if len(ends) else limit


def can_share(config: PreTrainedConfig) -> bool:
    """Return whether the tokens of a model see each other as a mask of four dimensions says, and in no other way."""
    has_window = getattr(config, "sliding_window", None) is not None
    has_full_attention = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    takes_mask = config._attn_implementation == "sdpa"  # eager attention adds a mask instead of applying it
    return config.model_type in SHARING_FAMILIES and takes_mask and has_full_attention and not has_window


@dataclass
class SharedPromptModel:
    """A model with TRL's fused head that takes the rows of preferences and runs the common prompts once."""

    model: Any

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **inputs: Any) -> Any:
        rows = share_prompts(input_ids, attention_mask, labels) if can_share(self.model.config) else None
        # With little in common one long row would take more memory for attention than two short ones.
        if rows is None or rows.input_ids.size(1) ** 2 > 2 * input_ids.size(1) ** 2:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs)
        outputs = self.model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            position_ids=rows.position_ids,
            shift_labels=rows.shift_labels,
            **inputs,
        )
        given = {name: getattr(outputs, name) for name in PER_TOKEN_FIELDS}
        return replace(outputs, **{name: rows.separate(each) for name, each in given.items() if each is not None})
