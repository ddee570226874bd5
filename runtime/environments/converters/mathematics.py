"""GSM8K (arXiv 2110.14168) and MATH-500 (arXiv 2305.20050) as tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.environments.converters.published import list_files, read_json_lines

_CALCULATION = re.compile(r"<<[^>]*>>")


def read_gsm8k(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the tasks of `train.jsonl` (practice, with the published solution as a demonstration) and `test.jsonl`
    (held-out)."""
    for path in list_files(source, "*.jsonl"):
        is_training = path.stem == "train"
        for number, row in enumerate(read_json_lines(path)):
            solution = _CALCULATION.sub("", row["answer"])
            task = {
                "name": f"gsm8k-{path.stem}-{number}",
                "split": "practice" if is_training else "held-out",
                "kind": "arithmetic",
                "messages": [
                    {
                        "role": "user",
                        "content": f"{row['question']}\nSolve it step by step. The last line is: #### and the number.",
                    }
                ],
                "grader": {"type": "numeric", "answer": solution.rpartition("####")[2].strip()},
            }
            if is_training:
                task["demonstration"] = [{"role": "assistant", "content": solution}]
            yield task


def read_math500(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the problems of `test.jsonl`, all held-out."""
    for path in list_files(source, "test.jsonl"):
        for number, row in enumerate(read_json_lines(path)):
            yield {
                "name": f"math500-{number}",
                "split": "held-out",
                "kind": str(row.get("subject", "mathematics")).lower().replace(" ", "-"),
                "messages": [
                    {
                        "role": "user",
                        "content": f"{row['problem']}\nSolve it step by step and put the final answer in \\boxed{{}}.",
                    }
                ],
                "grader": {"type": "latex", "answer": row["answer"]},
            }
