"""The environment of a task file: a reply, or calls that are graded and not run, or work on a database.

A row without a database ends with the first reply: its text and calls are what is graded. A row with one is played with
`execute_sql` until `submit_answer` is called, or a reply makes no call.
Invariant: the reward depends on the row and the policy's doing alone; a world that is broken (no sandbox, no critic)
fails the episode instead of rewarding it with 0.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memory.records.exemplars import render_call
from memory.schema import Split, Task
from runtime.engine.client import Message, ToolCall
from runtime.environments.base import Environment, Outcome, Playthrough
from runtime.environments.graders.base import GradingResources, Submission, read_submission
from runtime.environments.sql_database import STATEMENT_SECONDS, SqlDatabase
from runtime.environments.task_files.reader import TaskIndex, TaskNames, index_task_file, read_row
from runtime.environments.task_files.rows import SEALED, TaskRow, last_user_text, to_split
from runtime.errors import ToolError, UnknownTask
from runtime.tools.base import Tool

EXECUTE_SQL = {
    "type": "object",
    "properties": {"statement": {"type": "string", "description": "one SQL statement, in SQLite's dialect"}},
    "required": ["statement"],
}
SUBMIT_ANSWER = {
    "type": "object",
    "properties": {
        "values": {"type": "array", "items": {"type": "string"}, "description": "the values of the answer, each once"}
    },
    "required": ["values"],
}


class TaskFile(Environment):
    """The tasks of one JSONL file."""

    def __init__(
        self,
        name: str,
        index: TaskIndex,
        resources: GradingResources,
        *,
        system_prompt: str = "",
        temperature: float | None = 0.0,
        max_output_tokens: int = 1024,
    ) -> None:
        self.name = name
        self.system_prompt = system_prompt
        self.temperature = temperature
        self.max_output_tokens = max_output_tokens
        self._index = index
        self._resources = resources

    def task(self, name: str) -> Task:
        position = self._index.positions.get(name)
        if position is None:
            raise UnknownTask(f"{self.name} has no task {name!r}: `GET /v1/environments/{self.name}/tasks` lists them")
        return Task(environment=self.name, name=name, kind=position.kind, split=to_split(position.split))

    def tasks(self, split: Split, num_tasks: int, *, offset: int = 0) -> list[Task]:
        if split not in (Split.PRACTICE, Split.HELD_OUT):
            raise ValueError(f"{self.name} has no split {split.value!r}: use practice or held-out")
        return [self.task(name) for name in self._index.names[split.value][offset : offset + num_tasks]]

    def sealed_tasks(self, num_tasks: int) -> list[Task]:
        return [self.task(name) for name in self._index.names[SEALED][:num_tasks]]

    async def start(self, task: Task) -> TaskPlaythrough:
        return TaskPlaythrough(task, await self._read(task), self._resources)

    async def demonstrate(self, task: Task) -> list[Message] | None:
        row = await self._read(task)
        if row.demonstration is None or row.final_split != "practice":
            return None
        return [*row.opening, *(message.to_message() for message in row.demonstration)]

    async def _read(self, task: Task) -> TaskRow:
        return await asyncio.to_thread(read_row, self._index.path, self._index.positions[task.name])


def open_task_file(name: str, path: Path, resources: GradingResources, *, names_path: Path, **options: Any) -> TaskFile:
    """Return the environment of a file, and remember the names of its tasks in `names_path`.

    Raises:
        EnvironmentRefused: a row is invalid, or is another task than its name once was; then nothing is remembered.
    """
    task_names = TaskNames(names_path)
    index = index_task_file(path, resources, task_names.read())
    task_names.add(index)
    return TaskFile(name, index, resources, **options)


class TaskPlaythrough(Playthrough):
    """One started row."""

    def __init__(self, task: Task, row: TaskRow, resources: GradingResources) -> None:
        self.task = task
        self._row = row
        self._resources = resources
        self._opening = row.opening
        self._submission: Submission | None = None
        self._database = SqlDatabase(row.database) if row.database is not None else None
        self.task_text = last_user_text(self._opening)
        self.tools = self._database_tools() if row.database is not None else _graded_tools(row)

    @property
    def opening(self) -> Sequence[Message]:
        return self._opening

    def read_reply(self, text: str, calls: Sequence[ToolCall]) -> None:
        if self._database is not None and calls:
            return  # they run
        self._submission = self._name(read_submission(text, calls, self._row.definitions, self._database))
        self.is_done = True
        if calls:
            self.closing_text = "\n".join(filter(None, [text, *map(render_call, calls)]))

    async def close(self) -> Outcome:
        try:
            if self._submission is None:
                return Outcome(0.0, "there was no answer")
            return await self._row.grader.grade(self._submission, self._resources)
        finally:
            if self._database is not None:
                await self._database.close()

    def _name(self, submission: Submission) -> Submission:
        """Add the task, for graders that send it elsewhere."""
        return replace(submission, task=self._row.name, messages=self._opening)

    def _database_tools(self) -> list[Tool]:
        execute = "Run one SQL statement on the database and return its rows."
        submit = "Give the final answer. Where the task was to change the database, any value will do."
        return [
            Tool("execute_sql", execute, EXECUTE_SQL, self._execute, timeout_seconds=4 * STATEMENT_SECONDS),
            Tool("submit_answer", submit, SUBMIT_ANSWER, self._submit),
        ]

    async def _execute(self, arguments: dict[str, Any]) -> str:
        assert self._database is not None
        return await self._database.execute(arguments["statement"])

    async def _submit(self, arguments: dict[str, Any]) -> str:
        text = json.dumps(arguments["values"], ensure_ascii=False)
        self._submission = self._name(Submission(text, database=self._database))
        self.is_done, self.closing_text = True, text
        return text


def _graded_tools(row: TaskRow) -> list[Tool]:
    """Return the row's tools, whose calls end the task before they could run."""

    async def refuse(arguments: dict[str, Any]) -> str:
        raise ToolError("this call is graded, and not run")

    functions = [tool.function for tool in row.tools]
    return [Tool(it.name, it.description, dict(it.parameters), refuse) for it in functions]
