"""Training throughput in tokens a second: the project's trainers beside their peers over the same rows.

    python -m tests.bench.training [--rows 32] [--turns 3] [--threads 2] [--json FILE]

SFT's peer is a bare PyTorch loop over the same batches, which computes the loss as transformers does, over all logits.
DPO's is TRL with PEFT's layers and each side behind a prompt of its own. The rows are random tokens in the shape of a
function call: a prompt of 200 to 300 tokens, and answers of 20 to 50 with the loss; a preference counts the tokens of
both sides. Model, LoRA, autocast, optimizer and batches are the same on all sides. The sides alternate, so that a busy
machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from optimizer.data.rows import read_rows
from optimizer.training import child, dpo, sft
from optimizer.training.spec import TrainingSpec
from runtime.engine.model_families import find_model
from tests.bench.measure import make_parser, print_table, write_json

BATCH_SIZE = 4


def make_spec(home: Path, kind: str, base: Path, threads: int) -> TrainingSpec:
    """Return the spec of a training whose rows are in `home`."""
    return TrainingSpec(
        kind=kind,
        name="bench",
        version=1,
        base_model=str(base),
        rows_path=home / f"{kind}.jsonl",
        output_dir=home / "adapter",
        work_dir=home / "work",
        lora_rank=16,
        lora_alpha=32,
        learning_rate=1e-4,
        epochs=1,
        batch_size=BATCH_SIZE,
        rows_per_pass=BATCH_SIZE,
        device="cpu",
        num_threads=threads,
        num_checkpoints=1,
    )


def write_random_rows(path: Path, kind: str, num_rows: int) -> int:
    """Write rows of random tokens, demonstrations with one answer or preferences with two; return their tokens."""
    num_answers = 1 if kind == "sft" else 2
    draw = random.Random(0)
    num_tokens = 0
    with path.open("w") as lines:
        for _ in range(num_rows):
            prompt, *answers = (
                [draw.randrange(100, 49_000) for _ in range(draw.randint(*bounds))]
                for bounds in [(200, 300), *[(20, 50)] * num_answers]
            )
            if kind == "sft":
                (answer,) = answers
                row = {"input_ids": prompt + answer, "mask": [0] * len(prompt) + [1] * len(answer)}
            else:
                row = {"prompt_ids": prompt}
                for name, answer in zip(("chosen", "rejected"), answers, strict=True):
                    row |= {f"{name}_ids": answer, f"{name}_mask": [1] * len(answer)}
            num_tokens += sum(len(prompt) + len(answer) for answer in answers)
            lines.write(json.dumps(row) + "\n")
    return num_tokens


def train(trainer: Trainer) -> float:
    """Train; return the seconds of the steps."""
    began = time.monotonic()
    trainer.train()
    return time.monotonic() - began


def train_ours(spec: TrainingSpec) -> float:
    """Train with the project's trainer of this kind."""
    rows = read_rows(spec.rows_path)
    trainer = sft.build_trainer(spec, rows) if spec.kind == "sft" else dpo.build_trainer(spec, rows)
    child.fuse(cast(PeftModel, trainer.model), spec)
    return train(trainer)


def train_with_trl(spec: TrainingSpec) -> float:
    """Train preferences with PEFT's layers and a prompt for each side."""
    trainer = dpo.build_trainer(spec, read_rows(spec.rows_path))
    trainer._weigh = lambda model, inputs: dpo.WeighedModel(model, None)
    return train(trainer)


def train_bare(spec: TrainingSpec, batches: list[dict[str, torch.Tensor]]) -> float:
    """Take one step a batch with only PyTorch and PEFT; return the seconds."""
    base, _ = child.load_base(spec)
    model = get_peft_model(base, LoraConfig(**child.lora_settings(spec)))
    optimizer = torch.optim.AdamW([it for it in model.parameters() if it.requires_grad], lr=spec.learning_rate)
    model.train()
    began = time.monotonic()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=child.multiplies_in_bfloat16(spec)):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - began


def take_batches(spec: TrainingSpec) -> list[dict[str, torch.Tensor]]:
    """Return the batches that the project's trainer trains on, in their order."""
    trainer = sft.build_trainer(spec, read_rows(spec.rows_path))
    wanted = ("input_ids", "attention_mask", "labels")
    return [{key: batch[key] for key in wanted} for batch in trainer.get_train_dataloader()]


def measure(kind: str, peer: str, given: argparse.Namespace, home: Path) -> tuple[list[dict[str, Any]], float]:
    """Return the rates of both sides, and the median ratio of ours to the peer's."""
    spec = make_spec(home, kind, find_model("smollm2"), given.threads)
    num_tokens = write_random_rows(spec.rows_path, kind, given.rows)
    batches = take_batches(spec) if kind == "sft" else []
    seconds: dict[str, list[float]] = {"ours": [], peer: []}
    for _ in range(given.turns):
        seconds["ours"].append(train_ours(spec))
        seconds[peer].append(train_bare(spec, batches) if kind == "sft" else train_with_trl(spec))
    rates = {side: [num_tokens / each for each in of_side] for side, of_side in seconds.items()}
    rows = [
        {"method": kind, "side": side, "tokens_per_second": round(statistics.median(of_side), 1)}
        for side, of_side in rates.items()
    ]
    return rows, statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rates[peer], strict=True))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    child.score_own_tokens_only()
    rows, ratios = [], {}
    for kind, peer in (("sft", "bare loop"), ("dpo", "TRL and PEFT")):
        with tempfile.TemporaryDirectory() as home:
            measured, ratios[kind] = measure(kind, peer, given, Path(home))
            rows += measured
    notes = [f"{kind}: ours to the peer's {ratio:.2f}, the median of pairs" for kind, ratio in ratios.items()]
    print_table("Training throughput, SmolLM2-135M, LoRA of rank 16", rows, notes=notes)
    more: dict[str, Any] = {"ratios": {kind: round(ratio, 3) for kind, ratio in ratios.items()}}
    write_json(given.json, "training", rows, conditions={"threads": given.threads}, **more)


if __name__ == "__main__":
    main()
