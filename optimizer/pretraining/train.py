"""Pretrain the pocket model from scratch: `python -m optimizer.pretraining.train --transcripts FILE --out DIR`.

One seeded run, on 2 CPU cores or a GPU: more drills first, because everything else stands on looking rules up, then whole
games. Muon on the matrices and AdamW on the rest (Jordan et al., 2024). The run writes a
checkpoint every few minutes and goes on from it when started again with the same directory.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from optimizer.pretraining.chat import Piece
from optimizer.pretraining.corpus import PHRASES, Corpus, Mixture
from optimizer.pretraining.tokenizer import END, PAD, load_tokenizer, train_tokenizer
from optimizer.pretraining.wiring import wire_induction


@dataclass
class Recipe:
    """Everything that decides the weights, besides the transcripts."""

    seed: int = 0
    num_tokens: int = 6_000_000
    batch_tokens: int = 4608
    lengths: tuple[int, ...] = (384, 448, 512, 576, 640, 704, 768, 896)
    """Rows are padded to the next of these; longer ones are left out."""
    vocab_size: int = 1280
    hidden_size: int = 256
    num_layers: int = 4
    intermediate_size: int = 576
    matrix_lr: float = 0.01
    other_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 60
    decay_share: float = 0.35
    """The last share of the tokens over which the learning rates fall to a twentieth."""
    mixtures: tuple[tuple[float, Mixture], ...] = (
        (0.0, Mixture(recitals=0.1, drills=0.3)),
        (0.3, Mixture(recitals=0.03, drills=0.12)),
    )
    """From which share of the run on, which mixture is trained on."""
    is_compiled: bool = False
    """torch.compile: minutes of compiling for each of `lengths`, then half as fast again."""
    checkpoint_seconds: float = 180.0

    def mixture(self, done: float) -> Mixture:
        return [mixture for start, mixture in self.mixtures if done >= start][-1]

    def lr_factor(self, step: int, done: float) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = min(1.0, (1.0 - done) / self.decay_share)
        return warm * max(0.05, left)


@dataclass
class Batch:
    ids: torch.Tensor  # (num_rows, length) int64
    weights: torch.Tensor  # (num_rows, length) float32: weight of predicting this very token
    is_rule: torch.Tensor  # (num_rows, length) bool: tokens of rules that could be looked up


def encode(pieces: list[Piece], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Return token ids and the weight of each. Neighbours of one weight are encoded together, as vLLM would."""
    ids, weights = [], []
    for piece in pieces:
        if not piece.text:
            continue
        piece_ids = tokenizer.backend_tokenizer.encode(piece.text, add_special_tokens=False).ids
        ids += piece_ids
        weights += [piece.weight] * len(piece_ids)
    return ids, weights


def batches(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, done: Any) -> Iterator[Batch]:
    """Yield batches in a few fixed shapes (compiled kernels want them). `done()` is the share of the run behind us."""
    pad = tokenizer.convert_tokens_to_ids(PAD)
    buckets: dict[int, list[tuple[list[int], list[float]]]] = {length: [] for length in recipe.lengths}
    while True:
        row = encode(corpus.episode(recipe.mixture(done())), tokenizer)
        length = next((length for length in recipe.lengths if len(row[0]) <= length), None)
        if length is None:
            continue
        bucket = buckets[length]
        bucket.append(row)
        if len(bucket) == recipe.batch_tokens // length:
            yield collate(bucket, length, pad, corpus.weights.rule)
            bucket.clear()


def collate(rows: list[tuple[list[int], list[float]]], length: int, pad: int, rule_weight: float) -> Batch:
    ids = torch.full((len(rows), length), pad)
    weights = torch.zeros(len(rows), length)
    for row, (row_ids, row_weights) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        weights[row, : len(row_ids)] = torch.tensor(row_weights)
    return Batch(ids, weights, weights == rule_weight)


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a new model, its induction circuit wired in."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.hidden_size // 64,
        num_key_value_heads=recipe.hidden_size // 64,
        intermediate_size=recipe.intermediate_size,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.05)
    wire_induction(model, generator=torch.Generator().manual_seed(recipe.seed))
    return model


def make_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted mean loss and, per rule token that could be looked up, whether it was predicted."""
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    wanted = weights > 0
    with torch.autocast(batch.ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[wanted]).float()
    targets, weights = targets[wanted], weights[wanted]
    losses = F.cross_entropy(logits, targets, reduction="none")
    hits = (logits.argmax(-1) == targets)[batch.is_rule[:, 1:][wanted]]
    return (losses * weights).sum() / weights.sum(), hits


def pretrain(transcripts_file: Path, out: Path, recipe: Recipe, *, device: str) -> Qwen2ForCausalLM:
    """Train until `recipe.num_tokens` are seen; write model and tokenizer into `out`, progress into `out/train.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    source = json.loads(transcripts_file.read_text())
    corpus = Corpus(
        source["transcripts"],
        source["foods"],
        system_prompt=source["system_prompt"],
        tool=source["tool"],
        seed=recipe.seed,
    )
    tokenizer = _tokenizer(corpus, out, recipe)
    model = make_model(recipe, tokenizer).to(device)
    optimizers = make_optimizers(model, recipe)
    seen = step = 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        seen, step = state["seen"], state["step"]
        corpus.rng = random.Random(f"{recipe.seed}-{step}")
    if recipe.is_compiled:
        model.model.compile(dynamic=False)
    saved_at, began_at, began_seen, hit_counts = time.monotonic(), time.monotonic(), seen, [0, 0]
    with _progress() as progress, (out / "train.jsonl").open("a") as log:
        bar = progress.add_task("pretraining", total=recipe.num_tokens, completed=seen, note="")
        for batch in batches(corpus, tokenizer, recipe, done=lambda: seen / recipe.num_tokens):
            done = seen / recipe.num_tokens
            if done >= 1.0:
                break
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group.setdefault("peak_lr", group["lr"])
                    group["lr"] = group["peak_lr"] * recipe.lr_factor(step, done)
            batch = Batch(batch.ids.to(device), batch.weights.to(device), batch.is_rule.to(device))
            loss, hits = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seen, step = seen + batch.ids.numel(), step + 1
            hit_counts = [hit_counts[0] + int(hits.sum()), hit_counts[1] + hits.numel()]
            if step % 10 == 0:
                speed = (seen - began_seen) / (time.monotonic() - began_at)
                row = {"step": step, "seen": seen, "loss": round(loss.item(), 4), "tokens_per_second": round(speed)}
                row["rule_accuracy"] = round(hit_counts[0] / max(1, hit_counts[1]), 3)
                log.write(json.dumps(row) + "\n")
                log.flush()
                note = f"loss {row['loss']:.3f}, rules {row['rule_accuracy']:.2f}, {row['tokens_per_second']} tokens/s"
                progress.update(bar, completed=seen, note=note)
                hit_counts = [0, 0]
            if time.monotonic() - saved_at > recipe.checkpoint_seconds:
                _save_checkpoint(checkpoint, model, optimizers, seen, step)
                export(model, tokenizer, out)
                saved_at = time.monotonic()
    _save_checkpoint(checkpoint, model, optimizers, seen, step)
    export(model, tokenizer, out)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
    return model


def export(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write what vLLM and transformers load: bf16 safetensors, configuration, tokenizer with its template."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tokenizer(corpus: Corpus, out: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    if (out / "tokenizer.json").exists():
        return load_tokenizer(out)
    texts = ["".join(piece.text for piece in corpus.episode(Mixture(recitals=0.02, drills=0.1))) for _ in range(3000)]
    tokenizer = train_tokenizer(texts, header=corpus.header, phrases=PHRASES, vocab_size=recipe.vocab_size)
    tokenizer.save_pretrained(out)
    return tokenizer


def _save_checkpoint(path: Path, model: Any, optimizers: list[Any], seen: int, step: int) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "seen": seen,
        "step": step,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transcripts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=Recipe.num_tokens)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe(seed=arguments.seed, num_tokens=arguments.tokens)
    pretrain(arguments.transcripts, arguments.out, recipe, device=device)


if __name__ == "__main__":
    main()
