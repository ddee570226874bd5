"""Renders past successes as exemplars: a solved task as a few lines that a model can imitate.

Invariant: a trajectory is rendered the same in prompts and in training data, unless an operator reworded it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import defer
from sqlmodel import Session, col, select

from memory.records.exemplar_corrections import choose_correction, find_corrections, is_approved_since
from memory.records.trajectories import TOKEN_COLUMNS
from memory.schema import Step, StepKind, Trajectory
from memory.scopes import Scopes
from memory.team import read_by_client

# optimizer/pretraining/corpus.py cuts the exemplars that the pocket model is pretrained on by the same limits.
MAX_LINES = 3
MAX_CHARS = 240


def read_exemplar(session: Session, trajectory: Trajectory, scopes: Scopes) -> str | None:
    """Return the text of an exemplar: the operator's wording, or the recorded steps, with a correction in place of a
    corrected answer. None when the answer was wrong and no correction may be shown."""
    corrections = find_corrections(session, trajectory.id)
    is_reworded = trajectory.exemplar_text is not None
    if is_reworded and (not corrections or is_approved_since(trajectory, corrections[0])):
        return trajectory.exemplar_text
    query = select(Step).where(Step.trajectory_id == trajectory.id).order_by(col(Step.position))
    steps = read_by_client(session.exec(query.options(*map(defer, TOKEN_COLUMNS))).all())
    if not corrections:
        return render_exemplar(trajectory.task_text, steps)
    chosen = choose_correction(session, trajectory, corrections, scopes)
    if chosen is None:
        return None
    return render_exemplar(trajectory.task_text, [*_before_last_reply(steps), _reply(chosen.correction or "")])


def _before_last_reply(steps: Sequence[Step]) -> Sequence[Step]:
    positions = [position for position, step in enumerate(steps) if step.kind is StepKind.MODEL]
    # there is one: choose_correction returns None for an episode without a reply
    return steps[: positions[-1]]


def _reply(text: str) -> Step:
    return Step(trajectory_id="", position=0, kind=StepKind.MODEL, content=text)


def render_exemplar(task_text: str, steps: Sequence[Step]) -> str:
    """Return the task, then for each model call its text and its tool calls as `> <call>`, and the results, all cut."""
    lines = [cut(task_text)]
    for step in steps:
        if step.kind is not StepKind.MODEL:
            lines.append(cut(step.content))
            continue
        lines.append(" ".join(step.content.split())[:MAX_CHARS])
        lines.extend(f"> {render_call(call)}" for call in step.tool_calls)
    return "\n".join(line for line in lines if line)


def render_call(call: dict[str, Any]) -> str:
    """Return a tool call in short form: the bare value of a single string argument, else `name(key=value, ...)`."""
    function = call.get("function") or {}
    name, arguments = function.get("name") or "", function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:  # models write arguments that are no JSON
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
    """Return the first non-blank lines of a text, up to `MAX_LINES` lines and `MAX_CHARS` characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:MAX_LINES])[:MAX_CHARS].rstrip()
