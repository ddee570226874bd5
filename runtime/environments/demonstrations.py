"""Writes the demonstrations of an environment's practice tasks as rows of the format `ratchet`, without a server.

Invariant: held-out tasks are never among them, and the file appears complete or not at all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory.formats import complete
from memory.formats.content import ExampleContent, ExampleKind
from memory.schema import Split, Task
from runtime.config import EnvironmentConfig
from runtime.environments.base import Environment, describe_failure, find_environment
from runtime.environments.registry import open_environments
from runtime.errors import EnvironmentRefused


@dataclass
class Demonstrations:
    """Rows of the format `ratchet`, and the tasks that failed, each with its error."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


async def write_demonstrations(
    configured: Mapping[str, EnvironmentConfig], name: str, out: Path, *, num_tasks: int
) -> Demonstrations:
    """Write a row for each of the first practice tasks that has a demonstration.

    Raises:
        UnknownEnvironment, EnvironmentRefused; ValueError if there is no row.
    """
    # Only this environment, and names that are remembered nowhere: the data directory belongs to the server.
    with tempfile.TemporaryDirectory() as directory:
        chosen = {name: configured[name]} if name in configured else {}
        environment = find_environment(open_environments(chosen, Path(directory), _answer_nothing), name)
        made = await _make_rows(environment, environment.tasks(Split.PRACTICE, num_tasks))
    if not made.rows:
        failed = f"; {len(made.failures)} failed, the first is {made.failures[0]}" if made.failures else ""
        raise ValueError(f"no practice task of {name!r} has a demonstration{failed}")
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in made.rows), encoding="utf-8")
    partial.replace(out)
    return made


async def _make_rows(environment: Environment, tasks: Sequence[Task]) -> Demonstrations:
    made = Demonstrations()
    for task in tasks:
        try:
            row = await _make_row(environment, task)
        except EnvironmentRefused:  # no other task would escape it
            raise
        except Exception as error:  # an episode's edge: an environment may raise anything
            made.failures.append(describe_failure(task, error))
            continue
        if row is not None:
            made.rows.append(row)
    return made


async def _make_row(environment: Environment, task: Task) -> dict[str, Any] | None:
    messages = await environment.demonstrate(task)
    if messages is None:
        return None
    if environment.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": environment.system_prompt}, *messages]
    playthrough = await environment.start(task)
    try:
        tools = [tool.definition() for tool in playthrough.tools]
    finally:
        await playthrough.close()
    # the name: a cycle chooses its policy by tasks that nothing was trained on
    content = ExampleContent(ExampleKind.DEMONSTRATION, messages, tools=tools, task=task.name)
    return complete.write(content)


async def _answer_nothing(messages: list[dict[str, Any]], *, schema: dict[str, Any], max_tokens: int) -> str:
    raise AssertionError("nothing is graded here")
