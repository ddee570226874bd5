"""Makes task files of published benchmarks: `make_task_file("gsm8k", source, out)`.

Invariants: published test sets become held-out tasks and nothing else (BeerQA's files are divided by the names of
their questions), and held-out rows have no demonstration. Every row is validated before the file appears, complete or
not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runtime.environments.converters.agentbench import read_agentbench
from runtime.environments.converters.agentbench_os import read_agentbench_os
from runtime.environments.converters.bfcl import read_bfcl
from runtime.environments.converters.mathematics import read_gsm8k, read_math500
from runtime.environments.converters.programs import read_humaneval, read_mbpp
from runtime.environments.converters.published import SkippedTask
from runtime.environments.converters.reading import read_beerqa
from runtime.environments.task_files.reader import describe_error
from runtime.environments.task_files.rows import TaskRow

Rows = Iterator[dict[str, Any]] | Iterator[dict[str, Any] | SkippedTask]

BENCHMARKS: Mapping[str, Callable[[Path], Rows]] = {
    "agentbench-db": read_agentbench,
    "agentbench-os": read_agentbench_os,
    "beerqa": read_beerqa,
    "bfcl": read_bfcl,
    "gsm8k": read_gsm8k,
    "humaneval": read_humaneval,
    "math500": read_math500,
    "mbpp": read_mbpp,
}


@dataclass(frozen=True)
class MadeFile:
    """The files and counts of a conversion."""

    path: Path
    num_tasks: int
    splits: dict[str, int]
    kinds: dict[str, int]
    left_out: list[str] = field(default_factory=list)
    """Published tasks that cannot be tasks here: file, line and reason."""


def make_task_file(benchmark: str, source: Path, out: Path) -> MadeFile:
    """Write the tasks of a benchmark, published in the file or folder `source`, to `out`. Blocks.

    Raises:
        ValueError: no benchmark has that name, or `source` is not what it publishes; nothing is written then.
        OSError: a file cannot be read or written.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"no benchmark is called {benchmark!r}; there is: {', '.join(BENCHMARKS)}")
    rows, splits, kinds, content = list[dict[str, Any]](), Counter[str](), Counter[str](), dict[str, Any]()
    left_out = list[str]()
    try:
        for task in BENCHMARKS[benchmark](source):
            if isinstance(task, SkippedTask):
                left_out.append(task.reason)
                continue
            content = task
            row = TaskRow.model_validate(content)
            content["split"] = row.final_split
            if row.final_split != "practice":
                content.pop("demonstration", None)
            rows.append(content)
            splits[row.final_split] += 1
            kinds[row.kind] += 1
    except ValidationError as error:
        raise ValueError(f"{source}: task {content.get('name')!r}: {describe_error(error)}") from None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{source} is not {benchmark} as it is published: {error!r}") from error
    if not rows:
        raise ValueError(f"{source} holds no file of {benchmark}")
    partial = out.with_name(f"{out.name}.partial")
    rows.sort(key=_digest_name)
    # In ASCII: a few texts hold U+2028, at which many programs break a line.
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    partial.replace(out)
    return MadeFile(out, len(rows), dict(splits), dict(kinds), left_out)


def _digest_name(row: dict[str, Any]) -> bytes:
    return hashlib.sha256(row["name"].encode()).digest()
