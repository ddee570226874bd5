"""What tools once yielded: the record that a rehearsal is answered from.

This module refuses to know why it is asked. Only live episodes count, those that somebody asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, String, cast
from sqlmodel import Session, col, select

from memory.schema import Split, Step, StepKind, Trajectory

MAX_EPISODES_SEEN = 20_000  # in search of what a tool once yielded
MAX_EPISODES_READ = 1_000


def find_result(
    session: Session,
    tool_name: str,
    arguments: dict[str, Any],
    is_meant: Sequence[ColumnElement[bool]],
    values: Mapping[str, Any],
) -> str | None:
    """Return what a tool yielded when it was last called with these arguments in a live episode that fits the
    conditions, without error. `values` are those of the conditions' parameters.

    Looks at the newest `MAX_EPISODES_SEEN` live episodes, and in the newest `MAX_EPISODES_READ` that held the tool.
    """
    live = (
        select(Trajectory.id, cast(Trajectory.tools, String).label("tools"))
        .where(Trajectory.split == Split.LIVE, *is_meant)
        .order_by(col(Trajectory.id).desc())
        .limit(MAX_EPISODES_SEEN)
        .subquery()
    )
    holding = (
        select(live.c.id)
        .where(live.c.tools.contains(json.dumps(tool_name, ensure_ascii=False), autoescape=True))
        .order_by(live.c.id.desc())
        .limit(MAX_EPISODES_READ)
    )
    for trajectory_id in session.exec(holding, params=values):
        result = _last_result(session.exec(_steps_with_calls(trajectory_id)), tool_name, arguments)
        if result is not None:
            return result
    return None


def _steps_with_calls(trajectory_id: str) -> Select:
    """The query for what was called and what came of it, in order; token ids are left where they are."""
    return (
        select(Step.kind, Step.content, Step.tool_calls, Step.tool_name, Step.tool_call_id, Step.error)
        .where(Step.trajectory_id == trajectory_id)
        .order_by(col(Step.position))
    )


def _last_result(steps: Iterable[Any], tool_name: str, arguments: dict[str, Any]) -> str | None:
    """Return what the last such call of one episode yielded. Ids of calls are unique in one reply, not beyond."""
    result, asked = None, {}
    for step in steps:
        if step.kind is StepKind.MODEL:
            asked = {call["id"]: _arguments_of(call) for call in step.tool_calls}
        elif step.tool_name == tool_name and step.error is None and asked.get(step.tool_call_id) == arguments:
            result = step.content
    return result


def _arguments_of(call: dict[str, Any]) -> Any:
    try:
        return json.loads(call["function"]["arguments"] or "{}")
    except (json.JSONDecodeError, RecursionError):
        return None
