"""A started row of a task file: one reply that is graded, or work on a database until an answer is submitted.

Invariant: the reward depends on the row and the policy's doing alone; a world that is broken (no sandbox, no critic)
fails the episode instead of rewarding it with 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from memory.conversation import last_user_text
from memory.records.exemplars import render_call
from memory.schema import Task
from runtime.engine.client import Message, ToolCall
from runtime.environments.base import Outcome, Playthrough
from runtime.environments.graders.base import GradingResources, Submission, read_submission
from runtime.environments.sql_database import STATEMENT_SECONDS, SqlDatabase
from runtime.environments.task_files.rows import TaskRow
from runtime.errors import ToolError
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
        self._submission = read_submission(text, calls, self._row.definitions, self._database)
        self.is_done = True
        if calls:
            self.closing_text = "\n".join(filter(None, [text, *map(render_call, calls)]))

    async def close(self) -> Outcome:
        try:
            if self._submission is None:
                return Outcome(0.0, "there was no answer")
            named = replace(self._submission, task=self._row.name, messages=self._opening)
            return await self._row.grader.grade(named, self._resources)
        finally:
            if self._database is not None:
                await self._database.close()

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
        self._submission = Submission(text, database=self._database)
        self.is_done, self.closing_text = True, text
        return text


def _graded_tools(row: TaskRow) -> list[Tool]:
    """Return the row's tools, whose calls end the task before they could run."""

    async def refuse(arguments: dict[str, Any]) -> str:
        raise ToolError("this call is graded, and not run")

    functions = [tool.function for tool in row.tools]
    return [Tool(it.name, it.description, dict(it.parameters), refuse) for it in functions]
