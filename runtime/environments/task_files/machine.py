"""A started row with a machine: the tools `bash`, `answer` and `finish`, with the outputs and cuts of AgentBench."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from memory.schema import Task
from runtime.engine.client import ToolCall
from runtime.environments.base import Outcome
from runtime.environments.graders.base import GradingResources, Submission, read_submission
from runtime.environments.machines.machine import COMMAND_SECONDS, Machine, MachineSpec
from runtime.environments.task_files.playthrough import TaskPlaythrough
from runtime.environments.task_files.rows import TaskRow
from runtime.tools.base import Tool

MAX_OUTPUT_CHARS = 800
KEPT_CHARS = 780
NO_ANSWER = "None"
"""The answer that AgentBench's checks are given where a task was finished without one."""
BASH = {
    "type": "object",
    "properties": {"command": {"type": "string", "description": "bash code; it cannot read from the keyboard"}},
    "required": ["command"],
}
ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "string", "description": "exact and brief, such as a single number"}},
    "required": ["answer"],
}
FINISH = {"type": "object", "properties": {}}


async def start_playthrough(task: Task, row: TaskRow, resources: GradingResources) -> TaskPlaythrough:
    """Start a row.

    Raises:
        ToolRefused: its machine cannot be made here, or its setup fails.
    """
    if row.machine is None:
        return TaskPlaythrough(task, row, resources)
    machine = open_machine(row.name, row.machine)
    await machine.start()
    return MachinePlaythrough(task, row, resources, machine)


def open_machine(name: str, spec: MachineSpec) -> Machine:
    """Return the machine of the task called `name`, in which `$RANDOM` gives the same numbers every time."""
    return Machine(spec, seed=int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big"))


class MachinePlaythrough(TaskPlaythrough):
    """One started row with a machine, which ends with it."""

    def __init__(self, task: Task, row: TaskRow, resources: GradingResources, machine: Machine) -> None:
        super().__init__(task, row, resources)
        self._machine = machine
        bash = "Run bash code. Directory, variables and files are kept from call to call; long output is truncated."
        self.tools = [
            Tool("bash", bash, BASH, self._run, timeout_seconds=2 * COMMAND_SECONDS),
            Tool("answer", "Answer the question. This ends the task.", ANSWER, self._answer),
            Tool("finish", "Say that what was asked for is done. This ends the task.", FINISH, self._finish),
        ]

    def read_reply(self, text: str, calls: Sequence[ToolCall]) -> None:
        if calls:
            return  # they run
        self._end(read_submission(text, [], []), text)

    async def close(self) -> Outcome:
        try:
            return await super().close()
        finally:
            await self._machine.close()

    async def _run(self, arguments: dict[str, Any]) -> str:
        return describe_output(await self._machine.run_command(arguments["command"]))

    async def _answer(self, arguments: dict[str, Any]) -> str:
        return self._end(Submission(arguments["answer"]), arguments["answer"])

    async def _finish(self, arguments: dict[str, Any]) -> str:
        return self._end(Submission(NO_ANSWER), "The task is finished.")

    def _end(self, submission: Submission, closing_text: str) -> str:
        self._submission = replace(submission, machine=self._machine)
        self.is_done, self.closing_text = True, closing_text
        return closing_text


def describe_output(output: str) -> str:
    """Return a command's output as AgentBench shows it: cut to 780 characters where it has more than 800."""
    if not output:
        return "The output of the OS is empty."
    if len(output) > MAX_OUTPUT_CHARS:
        output = f"{output[:KEPT_CHARS]}\n[truncated because the output is too long]"
    return f"The output of the OS:\n\n{output}"
