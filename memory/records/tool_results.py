"""Looks up recorded tool results, with which practice and held-out episodes are answered.

Invariant: only results of live episodes are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, String, cast, select
from sqlmodel import Session, col

from memory.schema import Split, Step, StepKind, Trajectory

MAX_EPISODES_SEEN = 20_000  # newest live episodes that are searched for the tool
MAX_EPISODES_READ = 1_000  # of those that had the tool, whose steps are read


def find_result(
    session: Session,
    tool_name: str,
    arguments: dict[str, Any],
    conditions: Sequence[ColumnElement[bool]],
    values: Mapping[str, Any],
) -> str | None:
    """Return the result of the last successful call of a tool with these arguments in a live episode.

    The episode must meet the `conditions`, whose bound parameters are `values`. The search covers the newest
    `MAX_EPISODES_SEEN` live episodes, and reads the newest `MAX_EPISODES_READ` that had the tool. None without a match.
    """
    live = (
        select(col(Trajectory.id), cast(col(Trajectory.tools), String).label("tools"))
        .where(col(Trajectory.split) == Split.LIVE, *conditions)
        .order_by(col(Trajectory.id).desc())
        .limit(MAX_EPISODES_SEEN)
        .subquery()
    )
    with_tool = (
        select(live.c.id)
        # A cheap filter on the JSON text. A match in another field costs one more read and no wrong result.
        .where(live.c.tools.contains(json.dumps(tool_name, ensure_ascii=False), autoescape=True))
        .order_by(live.c.id.desc())
        .limit(MAX_EPISODES_READ)
    )
    for trajectory_id in session.scalars(with_tool, values):
        result = _last_result(session.execute(_steps_with_calls(trajectory_id)), tool_name, arguments)
        if result is not None:
            return result
    return None


def _steps_with_calls(trajectory_id: str) -> Select:
    """Return the query for calls and results of an episode in order, without the large columns of token ids."""
    return (
        select(*map(col, (Step.kind, Step.content, Step.tool_calls, Step.tool_name, Step.tool_call_id, Step.error)))
        .where(col(Step.trajectory_id) == trajectory_id)
        .order_by(col(Step.position))
    )


def _last_result(steps: Iterable[Any], tool_name: str, arguments: dict[str, Any]) -> str | None:
    """Return the result of the last such call in one episode. Hazard: call ids are unique within one reply only."""
    result: str | None = None
    arguments_by_id: dict[str | None, object] = {}
    for step in steps:
        if step.kind is StepKind.MODEL:
            arguments_by_id = {call["id"]: _arguments_of(call) for call in step.tool_calls}
        elif step.tool_name == tool_name and step.error is None and arguments_by_id.get(step.tool_call_id) == arguments:
            result = step.content
    return result


def _arguments_of(call: dict[str, Any]) -> object:
    try:
        return json.loads(call["function"]["arguments"] or "{}")
    except (json.JSONDecodeError, RecursionError):
        return None
