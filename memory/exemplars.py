"""Past successes, rendered to be shown: a solved task as a few lines that a model can imitate.

This module refuses to know how exemplars are found and how much room there is. The same trajectory always reads the
same, in the prompt and in the data that models are trained on, unless an operator put it into other words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlmodel import Session, col, select

from memory.schema import Step, StepKind, Trajectory

MAX_LINES = 3
MAX_CHARS = 240


def read_exemplar(session: Session, trajectory: Trajectory) -> str:
    """Return how a trajectory is shown: in the operator's words, or as it was recorded."""
    if trajectory.exemplar_text is not None:
        return trajectory.exemplar_text
    steps = session.exec(select(Step).where(Step.trajectory_id == trajectory.id).order_by(col(Step.position)))
    return render_exemplar(trajectory.task_text, steps.all())


def render_exemplar(task_text: str, steps: Sequence[Step]) -> str:
    """Return the task, then each model call's words and `> <action>` lines, then what came back, all cut short."""
    lines = [cut(task_text)]
    for step in steps:
        if step.kind is not StepKind.MODEL:
            lines.append(cut(step.content))
            continue
        lines.append(" ".join(step.content.split())[:MAX_CHARS])
        lines.extend(f"> {render_call(call)}" for call in step.tool_calls)
    return "\n".join(line for line in lines if line)


def render_call(call: dict[str, Any]) -> str:
    """Return a tool call compactly: the bare value of a single string argument, else `name(key=value, ...)`."""
    function = call.get("function") or {}
    name, arguments = function.get("name") or "", function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return f"{name}({' '.join(arguments.split())[:MAX_CHARS]})"
    if not isinstance(arguments, dict):
        return f"{name}({json.dumps(arguments, ensure_ascii=False)})"
    values = list(arguments.values())
    if len(values) == 1 and isinstance(values[0], str):
        return " ".join(values[0].split())
    return f"{name}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in arguments.items())})"


def cut(text: str) -> str:
    """Return the first lines of a text, blank ones left out, within `MAX_LINES` and `MAX_CHARS`."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:MAX_LINES])[:MAX_CHARS].rstrip()
