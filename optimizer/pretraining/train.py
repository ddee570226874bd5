"""Pretrain the pocket model from scratch (`serve.py pretrain --out DIR`).

One seeded run, on 2 CPU cores or a GPU: more drills first, because everything else stands on looking rules up, then
whole games. Muon on the matrices and AdamW on the rest (Jordan et al., 2024). The run writes a
checkpoint every few minutes and resumes from it when started again with the same directory.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from optimizer.pretraining.chat import Piece
from optimizer.pretraining.corpus import PHRASES, Corpus, Mixture
from optimizer.pretraining.tokenizer import END, PAD, load_tokenizer, token_id, train_tokenizer
from optimizer.pretraining.wiring import wire_induction


@dataclass
class Recipe:
    """Everything that decides the weights, besides the transcripts."""

    seed: int = 0
    num_tokens: int = 9_000_000
    batch_tokens: int = 4608
    # long enough for a game with an exemplar: with rows of at most 896 tokens, memory did harm (docs/log.md)
    lengths: tuple[int, ...] = (320, 448, 576, 704, 832, 960, 1152, 1536)
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
        (0.3, Mixture(recitals=0.02, drills=0.18)),
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

    def to(self, device: str) -> Batch:
        return Batch(self.ids.to(device), self.weights.to(device), self.is_rule.to(device))


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


@dataclass
class TrainingPosition:
    """How far a run has come."""

    num_tokens: int
    seen: int = 0
    step: int = 0
    began_at: float = field(default_factory=time.monotonic)
    began_seen: int = 0
    num_hits: int = 0
    num_lookups: int = 0

    @property
    def done(self) -> float:
        """The share of the run behind us."""
        return self.seen / self.num_tokens

    def count(self, batch: Batch, hits: torch.Tensor) -> None:
        self.seen += batch.ids.numel()
        self.step += 1
        self.num_hits += int(hits.sum())
        self.num_lookups += hits.numel()

    def report(self, loss: float) -> dict[str, Any]:
        """Return where the run stands; look-ups are counted from one report to the next."""
        speed = (self.seen - self.began_seen) / (time.monotonic() - self.began_at)
        accuracy = self.num_hits / max(1, self.num_lookups)
        self.num_hits = self.num_lookups = 0
        return {
            "step": self.step,
            "seen": self.seen,
            "loss": round(loss, 4),
            "rule_accuracy": round(accuracy, 3),
            "tokens_per_second": round(speed),
        }


def batches(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, position: TrainingPosition
) -> Iterator[Batch]:
    """Yield batches in a few fixed shapes, which compiled kernels want, mixed as the recipe wants at this position."""
    pad = token_id(tokenizer, PAD)
    buckets: dict[int, list[tuple[list[int], list[float]]]] = {length: [] for length in recipe.lengths}
    while True:
        row = encode(corpus.episode(recipe.mixture(position.done)), tokenizer)
        # the lengths must rise; an episode longer than the last is left out, not cut
        length = next((length for length in recipe.lengths if len(row[0]) <= length), None)
        if length is None:
            continue
        bucket = buckets[length]
        bucket.append(row)
        if len(bucket) == recipe.batch_tokens // length:
            yield collate(bucket, length, pad, corpus.weights.rule)
            bucket.clear()


def collate(rows: list[tuple[list[int], list[float]]], length: int, pad: int, rule_weight: float) -> Batch:
    """Pad rows of (token ids, weight of each) to one batch, (num_rows, length); `rule_weight` marks tokens of rules."""
    ids = torch.full((len(rows), length), pad)
    weights = torch.zeros(len(rows), length)
    for row, (row_ids, row_weights) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        weights[row, : len(row_ids)] = torch.tensor(row_weights)
    # rules are recognised by their weight: no other token may have it (corpus.Weights)
    return Batch(ids, weights, weights == rule_weight)


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a new model, its induction circuit wired in."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        # rounded up for the kernels: the last ids have no token
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
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, PAD),
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.05)
    # last: an initialisation after this would overwrite the wired heads
    wire_induction(model, generator=torch.Generator().manual_seed(recipe.seed))
    return model


def make_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    # Muon orthogonalises updates of matrices; embeddings are look-up tables and get AdamW. The tied LM head is the
    # embedding
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: Qwen2ForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted mean loss and, per rule token that could be looked up, whether it was predicted."""
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    wanted = weights > 0
    with torch.autocast(batch.ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
        # only positions with a weight: logits of all positions would need most of the memory
        logits = model.lm_head(hidden[wanted]).float()
    targets, weights = targets[wanted], weights[wanted]
    losses = F.cross_entropy(logits, targets, reduction="none")
    hits = (logits.argmax(-1) == targets)[batch.is_rule[:, 1:][wanted]]
    return (losses * weights).sum() / weights.sum(), hits


def pretrain(
    transcripts_file: Path, out: Path, recipe: Recipe, *, device: str, console: Console | None = None
) -> Qwen2ForCausalLM:
    """Train until `recipe.num_tokens` are seen; the model goes into `out`, its checkpoint beside it."""
    out.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}-course")
    beside.mkdir(exist_ok=True)
    (beside / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
    source = json.loads(transcripts_file.read_text())
    described = {"system_prompt": source["system_prompt"], "tool": source["tool"], "seed": recipe.seed}
    corpus = Corpus(source["transcripts"], source["foods"], **described)
    tokenizer = _tokenizer(corpus, out, recipe)
    model = make_model(recipe, tokenizer)
    torch.nn.Module.to(model, device)  # in place; the method of transformers is typed as something else
    optimizers = make_optimizers(model, recipe)
    position = TrainingPosition(recipe.num_tokens)
    checkpoint = Checkpoint(beside / "checkpoint.pt", model, optimizers, position)
    if checkpoint.load(device):
        # not the old sequence again: the episodes before the checkpoint have been seen
        corpus.rng = random.Random(f"{recipe.seed}-{position.step}")
    if recipe.is_compiled:
        model.model.compile(dynamic=False)
    with _progress(console) as progress, (beside / "train.jsonl").open("a") as log:
        bar = progress.add_task("pretraining", total=recipe.num_tokens, completed=position.seen, note="")
        for batch in batches(corpus, tokenizer, recipe, position):
            if position.done >= 1.0:
                break
            set_rates(optimizers, recipe.lr_factor(position.step, position.done))
            loss = train_step(model, optimizers, batch.to(device), position)
            if position.step % 10 == 0:
                row = position.report(loss)
                print(json.dumps(row), file=log, flush=True)
                note = "loss {loss:.3f}, rules {rule_accuracy:.2f}, {tokens_per_second} tokens/s".format(**row)
                progress.update(bar, completed=position.seen, note=note)
            if checkpoint.age_seconds > recipe.checkpoint_seconds:
                checkpoint.save()
    checkpoint.save()
    export(model, tokenizer, out)
    return model


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # kept in the group, hence in the checkpoint: the next factor applies to the peak, not to the rate of the
            # last step
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * factor


def train_step(
    model: Qwen2ForCausalLM, optimizers: list[torch.optim.Optimizer], batch: Batch, position: TrainingPosition
) -> float:
    """Take one step; return the loss before it."""
    loss, hits = loss_of(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    position.count(batch, hits)
    return loss.item()


@dataclass
class Checkpoint:
    """The state from which a run continues; on disk whole or not at all."""

    path: Path
    model: Qwen2ForCausalLM
    optimizers: list[torch.optim.Optimizer]
    position: TrainingPosition
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def age_seconds(self) -> float:
        return time.monotonic() - self.saved_at

    def load(self, device: str) -> bool:
        """Go on from the file; False if there is none."""
        if not self.path.exists():
            return False
        # weights_only: a pickle could run code
        state = torch.load(self.path, map_location=device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.position.seen = self.position.began_seen = state["seen"]
        self.position.step = state["step"]
        return True

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "seen": self.position.seen,
            "step": self.position.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)
        self.saved_at = time.monotonic()


def export(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write what vLLM and transformers load: bf16 safetensors, configuration, tokenizer with its template."""
    # a copy: the checkpoint of the run stays in float32
    exported = copy.deepcopy(model)
    torch.nn.Module.to(exported, torch.bfloat16)
    exported.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tokenizer(corpus: Corpus, out: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    # before the corpus is used: a resumed run must not draw the 3,000 texts again, nor get another vocabulary
    if (out / "tokenizer.json").exists():
        return load_tokenizer(out)
    texts = ["".join(piece.text for piece in corpus.episode(Mixture(recitals=0.02, drills=0.1))) for _ in range(3000)]
    tokenizer = train_tokenizer(texts, header=corpus.header, phrases=PHRASES, vocab_size=recipe.vocab_size)
    tokenizer.save_pretrained(out)
    return tokenizer


def _progress(console: Console | None) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()
    return Progress(*columns, console=console)


def pretrain_in(directory: Path, recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """Train on `directory/transcripts.json`, on a GPU if there is one; return a description of the model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = pretrain(directory / "transcripts.json", directory / "model", recipe, device=device, console=console)
    return {
        "model": str(directory / "model"),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_tokens": recipe.num_tokens,
    }
