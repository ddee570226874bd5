"""Training throughput in tokens a second: the project's SFT trainer beside a bare PyTorch loop over the same batches.

    python -m tests.bench.training [--rows 32] [--turns 3] [--json FILE]

The rows are random tokens in the shape of a function call: a prompt of 200 to 300 tokens, and an answer of 20 to 50
with the loss. Model, LoRA, autocast, optimizer and batches are the same on all sides; the loop computes the loss as
transformers does, over all logits. The sides alternate, so that a busy machine slows all of them.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from optimizer.data.rows import read_rows
from optimizer.training import child, sft
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


def write_random_rows(path: Path, num_rows: int) -> None:
    """Write demonstrations of random tokens, one answer each."""
    draw = random.Random(0)
    with path.open("w") as lines:
        for _ in range(num_rows):
            num_prompt, num_answer = draw.randint(200, 300), draw.randint(20, 50)
            ids = [draw.randrange(100, 49_000) for _ in range(num_prompt + num_answer)]
            lines.write(json.dumps({"input_ids": ids, "mask": [0] * num_prompt + [1] * num_answer}) + "\n")


def train_ours(spec: TrainingSpec) -> float:
    """Train with the project's trainer; return the seconds of its steps."""
    trainer = sft.build_trainer(spec, read_rows(spec.rows_path))
    began = time.monotonic()
    trainer.train()
    return time.monotonic() - began


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


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    child.score_own_tokens_only()
    base = find_model("smollm2")
    seconds: dict[str, list[float]] = {"ours": [], "bare loop": []}
    with tempfile.TemporaryDirectory() as home:
        spec = make_spec(Path(home), "sft", base, given.threads)
        write_random_rows(spec.rows_path, given.rows)
        num_tokens = sum(len(row["input_ids"]) for row in read_rows(spec.rows_path))
        batches = take_batches(spec)
        for _ in range(given.turns):
            seconds["ours"].append(train_ours(spec))
            seconds["bare loop"].append(train_bare(spec, batches))
    rates = {side: [num_tokens / each for each in of_side] for side, of_side in seconds.items()}
    rows = [
        {"side": side, "tokens_per_second": round(statistics.median(of_side), 1)} for side, of_side in rates.items()
    ]
    ratio = statistics.median(ours / bare for ours, bare in zip(rates["ours"], rates["bare loop"], strict=True))
    notes = [f"ours / bare loop {ratio:.2f}, the median of {given.turns} pairs; {num_tokens} tokens a turn"]
    print_table("Training throughput, SmolLM2-135M, LoRA of rank 16", rows, notes=notes)
    more: dict[str, Any] = {"ratio": round(ratio, 3), "num_tokens": num_tokens}
    write_json(given.json, "training", rows, conditions={"threads": given.threads}, **more)


if __name__ == "__main__":
    main()
