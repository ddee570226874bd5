"""A game of levers: pull them in the order of the task's name; a wrong pull ends it."""

from __future__ import annotations

from typing import Any

from memory.schema import Split, Task
from runtime.environments.base import Environment, Outcome, Playthrough
from runtime.errors import UnknownTask
from runtime.tools.base import Tool

PULL = {
    "type": "object",
    "properties": {"lever": {"type": "string", "enum": ["left", "right"]}},
    "required": ["lever"],
}


class Levers(Environment):
    """Tasks are named by their solution, such as `left-right-left`."""

    name = "levers"
    system_prompt = "You pull levers."

    def __init__(self) -> None:
        self.started: list[LeverGame] = []

    def task(self, name: str) -> Task:
        if not set(name.split("-")) <= {"left", "right"}:
            raise UnknownTask(f"levers has no task {name!r}: join left and right by hyphens")
        return Task(environment=self.name, name=name, kind="pulling", split=Split.PRACTICE)

    def tasks(self, split: Split, num_tasks: int, *, offset: int = 0) -> list[Task]:
        return [self.task("left-right-left")] * num_tasks

    async def start(self, task: Task) -> LeverGame:
        self.started.append(LeverGame(task))
        return self.started[-1]


class LeverGame(Playthrough):
    """One game in progress."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.task_text = "Three levers are before you."
        self.tools = [Tool("pull", "Pull a lever.", PULL, self._pull, timeout_seconds=30)]
        self.pulled: list[str] = []
        self.num_closed = 0
        self.close_error: Exception | None = None

    async def _pull(self, arguments: dict[str, Any]) -> str:
        solution = self.task.name.split("-")
        self.pulled.append(arguments["lever"])
        if self.pulled != solution[: len(self.pulled)]:
            self.is_done, self.closing_text = True, "The floor opens."
        elif len(self.pulled) == len(solution):
            self.is_done, self.closing_text = True, "The door opens."
        return self.closing_text or "Click."

    async def close(self) -> Outcome:
        self.num_closed += 1
        if self.close_error is not None:
            raise self.close_error
        is_won = self.pulled == self.task.name.split("-")
        return Outcome(float(is_won), "opened the door" if is_won else "did not open the door")
