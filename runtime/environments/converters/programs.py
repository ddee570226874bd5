"""HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732, in MultiPL-E's rows) as tasks with unit tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.environments.converters.published import list_files, read_json_lines

MBPP_TEST_IDS = range(11, 511)
"""The published split of MBPP: 11 to 510 test; the others prompt, validate and train."""


def read_humaneval(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the problems of `HumanEval.jsonl.gz`, all held-out."""
    for path in list_files(source, "HumanEval.jsonl*"):
        for row in read_json_lines(path):
            tests = f"{row['test']}\ncheck({row['entry_point']})\n"
            yield _write_task(row["task_id"], "held-out", row["prompt"], row["entry_point"], tests)


def read_mbpp(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the problems of `mbpp-py.jsonl`: held-out where MBPP has them in its test split, else practice."""
    for path in list_files(source, "mbpp-py.jsonl"):
        for row in read_json_lines(path):
            match = re.match(r"mbpp_(\d+)_", row["name"])
            if match is None:
                raise ValueError(f"{path}: {row['name']!r} has no number behind mbpp, so its split is unknown")
            split = "held-out" if int(match[1]) in MBPP_TEST_IDS else "practice"
            yield _write_task(row["name"], split, row["prompt"], row["entry_point"], row["test"])


def _write_task(name: str, split: str, prompt: str, entry_point: str, tests: str) -> dict[str, Any]:
    request = f"Write this Python function. Reply with its whole code in a fenced block.\n```python\n{prompt}```"
    return {
        "name": name,
        "split": split,
        "kind": "python",
        "messages": [{"role": "user", "content": request}],
        "grader": {"type": "unit_tests", "prompt": prompt, "entry_point": entry_point, "tests": tests},
    }
