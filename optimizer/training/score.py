"""Scores prompts: `python -m optimizer.training.score spec.json` writes log p(yes) - log p(no) of each.

The model is `parent_adapter` on the base. Rows have `input_ids`, the two answers' token ids in `answers`, and `is_base`
where the bare base is asked instead; the file of margins appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch

from memory.storage.whole_files import write_whole
from optimizer.data.rows import read_rows
from optimizer.training import child
from optimizer.training.launch import margins_path
from optimizer.training.spec import TrainingSpec


@torch.inference_mode()
def score(spec: TrainingSpec, rows: list[dict[str, Any]], reporter: child.Reporter) -> list[float]:
    """Return the margin of each row."""
    model, _ = child.load_start(spec, is_trained=False)
    device = "cuda" if child.uses_gpu(spec) else "cpu"
    model = model.to(device).eval()
    margins = []
    for number, row in enumerate(rows, start=1):
        ids = torch.tensor([row["input_ids"]], device=device)  # (1, num_tokens): no padding, so no attention mask
        # the last position predicts the answer
        with model.disable_adapter() if row["is_base"] else contextlib.nullcontext():
            logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1]  # (vocabulary,)
        # float32 before the softmax: bfloat16 has coarse steps
        logprobs = logits.float().log_softmax(dim=-1)
        yes, no = (float(logprobs[token]) for token in row["answers"])
        margins.append(yes - no)
        reporter.emit("step", step=number, total=len(rows))
    return margins


def main() -> None:
    spec, reporter = child.start(sys.argv, "score")
    margins = score(spec, read_rows(spec.rows_path), reporter)
    write_whole(margins_path(spec), json.dumps(margins))


if __name__ == "__main__":
    main()
