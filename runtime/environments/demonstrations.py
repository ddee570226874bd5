"""Writes the demonstrations of an environment's practice tasks as rows of SFT data, without a server.

Invariant: held-out tasks are never among them, and the file appears complete or not at all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memory.schema import Split, Task
from runtime.config import EnvironmentConfig
from runtime.environments.base import Environment, find_environment
from runtime.environments.registry import open_environments


async def write_demonstrations(
    configured: Mapping[str, EnvironmentConfig], name: str, out: Path, *, num_tasks: int
) -> int:
    """Write a row `{"messages", "tools"}` for each of the first practice tasks that has a demonstration; return their
    number.

    Raises:
        UnknownEnvironment, EnvironmentRefused; ValueError if no task has a demonstration.
    """
    # Only this environment, and names that are remembered nowhere: the data directory belongs to the server.
    with tempfile.TemporaryDirectory() as directory:
        chosen = {name: configured[name]} if name in configured else {}
        environment = find_environment(open_environments(chosen, Path(directory), _answer_nothing), name)
        tasks = environment.tasks(Split.PRACTICE, num_tasks)
        rows = [row for task in tasks if (row := await _make_row(environment, task)) is not None]
    if not rows:
        raise ValueError(f"no practice task of {name!r} has a demonstration")
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    partial.replace(out)
    return len(rows)


async def _make_row(environment: Environment, task: Task) -> dict[str, Any] | None:
    messages = await environment.demonstrate(task)
    if messages is None:
        return None
    if environment.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": environment.system_prompt}, *messages]
    playthrough = await environment.start(task)
    tools = [tool.definition() for tool in playthrough.tools]
    await playthrough.close()
    return {"messages": messages, "tools": tools}


async def _answer_nothing(messages: list[dict[str, Any]], *, schema: dict[str, Any], max_tokens: int) -> str:
    raise AssertionError("nothing is graded here")
