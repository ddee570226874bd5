"""The environment of a task file: a reply, or calls that are graded and not run, or work on a database or machine.

A row without a database or machine ends with the first reply: its text and calls are what is graded. One with a
database is played with `execute_sql` until `submit_answer` is called, one with a machine with `bash` until `answer` or
`finish` is called; both end when a reply makes no call.
Invariant: a file that changed under the server starts no task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memory.schema import Split, Task
from runtime.engine.client import Message
from runtime.environments.base import Environment
from runtime.environments.graders.base import GradingResources
from runtime.environments.task_files.machine import start_playthrough
from runtime.environments.task_files.playthrough import TaskPlaythrough
from runtime.environments.task_files.reader import TaskIndex, TaskNames, index_task_file, read_row
from runtime.environments.task_files.rows import SEALED, TaskRow, to_split
from runtime.errors import UnknownTask


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

    def is_sealed(self, name: str) -> bool:
        position = self._index.positions.get(name)
        return position is not None and position.split == SEALED

    def find_tasks(self, name: str | None, texts: Sequence[str]) -> set[str]:
        # The name first: two tasks may ask the same of different databases.
        if name in self._index.positions:
            return {name}
        return {each for text in texts for each in self._index.find_tasks(text)}

    async def start(self, task: Task) -> TaskPlaythrough:
        return await start_playthrough(task, await self._read(task), self._resources)

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
