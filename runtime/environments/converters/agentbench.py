"""The database tasks of AgentBench (arXiv 2308.03688) as tasks with a database.

Departures: SQLite instead of MySQL, a shorter prompt, and `submit_answer` with a list of values instead of
`commit_final_answer`; what is compared is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.environments.converters.published import list_files, read_json_lines

SPLITS = {"dev": "practice", "standard": "held-out"}
CHANGES = ("INSERT", "UPDATE", "DELETE")
PROMPT = (
    "You work on an SQLite database to answer a question or to change the database as asked. Run statements with "
    "execute_sql, then call submit_answer."
)


def read_agentbench(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the tasks of `dev.jsonl` (practice) and `standard.jsonl` (held-out), with or without `dbbench_` before."""
    for path in list_files(source, "*.jsonl"):
        part = path.stem.removeprefix("dbbench_")
        if part not in SPLITS:
            raise ValueError(f"{str(path)!r} is neither dev.jsonl nor standard.jsonl of AgentBench's database tasks")
        for number, row in enumerate(read_json_lines(path)):
            question = f"{row['description']}\n{row.get('add_description', '')}".strip()
            yield {
                "name": f"dbbench_{part}-{number}",
                "split": SPLITS[part],
                "kind": f"sql-{row['type'][0].split('-')[0].lower()}",
                "messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": question}],
                "database": [_read_table(row["table"])],
                "grader": _read_grader(row),
            }


def _read_table(table: dict[str, Any]) -> dict[str, Any]:
    # All columns are text, as AgentBench creates them, whatever type the row declares; MySQL compares it without case.
    return {
        "name": table["table_name"],
        "columns": [
            {"name": column["name"], "type": "TEXT COLLATE NOCASE"} for column in table["table_info"]["columns"]
        ],
        "rows": [[str(value) for value in row] for row in table["table_info"]["rows"]],
    }


def _read_grader(row: dict[str, Any]) -> dict[str, Any]:
    if row["type"][0] in CHANGES:
        # A printed list of one tuple: "[('09aa...',)]".
        return {"type": "database_state", "digest": row["answer_md5"].strip("[]()',")}
    return {"type": "values", "answer": [str(value) for value in row["label"]]}
