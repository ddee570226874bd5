"""Checks a task file without a server: every row, the order, and that a row's own grader accepts its demonstration."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memory.schema import Task
from runtime.environments.base import Outcome
from runtime.environments.graders.base import GradingResources
from runtime.environments.task_files.machine import start_playthrough
from runtime.environments.task_files.reader import TaskIndex, index_task_file, read_row
from runtime.environments.task_files.rows import TaskRow, to_split
from runtime.tools.base import run_tool

FIRST_SHARE = 5
"""The first one of so many tasks of a split should have every frequent kind."""
MIN_FREQUENT = 30
"""A kind with so many tasks in a split is frequent: by chance one order in a thousand has none of it at first."""


@dataclass
class CheckedFile:
    """The contents of a file, and the demonstrations that its graders do not accept."""

    num_tasks: int
    splits: dict[str, int]
    kinds: dict[str, int]
    graders: dict[str, int]
    num_demonstrations: int = 0
    """Those that were graded; those that take a critic are not."""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Splits whose first tasks lack a frequent kind."""


async def check_task_file(path: Path, resources: GradingResources | None = None) -> CheckedFile:
    """Return what a file holds.

    Raises:
        EnvironmentRefused: it is missing, or rows are invalid; the message names each by file and line.
    """
    resources = replace(resources or GradingResources(), complete=_answer_nothing)
    index = index_task_file(path, resources)
    splits, kinds = (Counter(getattr(it, of) for it in index.positions.values()) for of in ("split", "kind"))
    checked = CheckedFile(len(index.positions), dict(splits), dict(kinds), {}, warnings=_find_blocks(index))
    for name, position in index.positions.items():
        row = read_row(path, position)
        checked.graders[row.grader.type] = checked.graders.get(row.grader.type, 0) + 1
        if row.demonstration is None or row.grader.needs_critic:
            continue
        checked.num_demonstrations += 1
        outcome = await _play_demonstration(row, resources)
        if outcome.value < 1.0:
            checked.problems.append(f"{path}:{position.line}: the demonstration of task {name!r}: {outcome.reason}")
    return checked


def _find_blocks(index: TaskIndex) -> list[str]:
    """Return a line for each split whose first tasks lack a frequent kind."""
    lines = []
    for split, names in index.names.items():
        kinds = [index.positions[name].kind for name in names]
        first = kinds[: len(kinds) // FIRST_SHARE]
        missing = sorted(kind for kind, count in Counter(kinds).items() if count >= MIN_FREQUENT and kind not in first)
        if missing:
            lines.append(
                f"{index.path}: the first {len(first)} of {len(names)} {split} tasks have none of the kinds "
                f"{', '.join(missing)}: tasks are taken in the file's order, so mix the kinds"
            )
    return lines


async def _answer_nothing(messages: list[dict[str, Any]], *, schema: dict[str, Any], max_tokens: int) -> str:
    raise AssertionError("rubrics are not graded here")


async def _play_demonstration(row: TaskRow, resources: GradingResources) -> Outcome:
    """Play a demonstration as a policy would have played it."""
    task = Task(environment=None, name=row.name, kind=row.kind, split=to_split(row.final_split))
    playthrough = await start_playthrough(task, row, resources)
    tools = {tool.name: tool for tool in playthrough.tools}
    for message in row.demonstration or ():
        if message.role != "assistant" or playthrough.is_done:
            continue
        calls = [call.model_dump() for call in message.tool_calls or ()]
        playthrough.read_reply(message.content or "", calls)
        for call in calls:
            tool = tools.get(call["function"]["name"])
            if tool is not None and not playthrough.is_done:
                await run_tool(tool, call["function"]["arguments"])
    return await playthrough.close()
