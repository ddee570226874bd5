"""A Llama forward pass in numpy over a GGUF file's own tensors, as llama.cpp computes it: an independent check of the
conversion. Query and key weights are used in the file's layout, where rotary embeddings rotate neighbouring
dimensions."""

from __future__ import annotations

from pathlib import Path

import numpy

Array = numpy.ndarray


def write_logits(gguf_path: str, output: str, *ids: str) -> None:
    """Write the logits of every position. Needs the package `gguf`."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_path)
    weights = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    settings = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    numpy.save(Path(output), run(weights, settings, [int(token) for token in ids]))


def run(weights: dict[str, Array], settings: dict, ids: list[int]) -> Array:
    """Return the logits, one row for each of `ids`."""
    heads, kv_heads = settings["llama.attention.head_count"], settings["llama.attention.head_count_kv"]
    epsilon = settings["llama.attention.layer_norm_rms_epsilon"]

    def norm(values: Array, name: str) -> Array:
        return values / numpy.sqrt((values**2).mean(-1, keepdims=True) + epsilon) * weights[name]

    state = weights["token_embd.weight"][ids]
    for layer in range(settings["llama.block_count"]):

        def through(values: Array, name: str, layer: int = layer) -> Array:
            return values @ weights[f"blk.{layer}.{name}.weight"].T

        normed = norm(state, f"blk.{layer}.attn_norm.weight")
        query = rotate(through(normed, "attn_q"), heads, settings["llama.rope.freq_base"])
        key = rotate(through(normed, "attn_k"), kv_heads, settings["llama.rope.freq_base"])
        value = through(normed, "attn_v").reshape(len(ids), kv_heads, -1)
        key, value = (numpy.repeat(part, heads // kv_heads, axis=1) for part in (key, value))
        state = state + through(attend(query, key, value), "attn_output")
        normed = norm(state, f"blk.{layer}.ffn_norm.weight")
        gate = through(normed, "ffn_gate")
        state = state + through(gate / (1 + numpy.exp(-gate)) * through(normed, "ffn_up"), "ffn_down")
    return norm(state, "output_norm.weight") @ weights["token_embd.weight"].T


def rotate(values: Array, heads: int, base: float) -> Array:
    """Return the heads of `values` with each pair of neighbouring dimensions rotated by its position."""
    parts = values.reshape(len(values), heads, -1, 2)
    size = 2 * parts.shape[2]
    angles = numpy.arange(len(values))[:, None] * base ** (-numpy.arange(0, size, 2) / size)
    cosine, sine = numpy.cos(angles)[:, None], numpy.sin(angles)[:, None]
    first, second = parts[..., 0], parts[..., 1]
    turned = numpy.stack([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
    return turned.reshape(len(values), heads, size)


def attend(query: Array, key: Array, value: Array) -> Array:
    scores = numpy.einsum("qhd,khd->hqk", query, key) / numpy.sqrt(query.shape[-1])
    scores = numpy.where(numpy.tril(numpy.ones(scores.shape[1:], bool)), scores, -numpy.inf)
    shares = numpy.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return numpy.einsum("hqk,khd->qhd", shares, value).reshape(len(query), -1)
