"""BeerQA (arXiv 2010.12527) as tasks of reading: the gold paragraphs, then the question."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.environments.converters.published import list_files


def read_beerqa(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions of the published JSON file, whatever its own split. The name of a task decides its split, 60,
    30 and 10 %.

    Retrieval is not part of the task: each question comes with the paragraphs that answer it. A reply is right if it
    contains one of the answers.
    """
    for path in list_files(source, "*.json"):
        for row in json.loads(path.read_text(encoding="utf-8"))["data"]:
            passages = "\n".join(f"{title}: {text}" for title, text in row["context"])
            question = f"{passages}\n\n{row['question']}\nAnswer in a few words."
            task: dict[str, Any] = {
                "name": f"beerqa-{row['id']}",
                "kind": row["src"],
                "messages": [{"role": "user", "content": question}],
                "grader": {"type": "contains", "answer": row["answers"]},
            }
            yield task | {"demonstration": [{"role": "assistant", "content": row["answers"][0]}]}
