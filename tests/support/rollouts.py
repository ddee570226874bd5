"""Plays one turn, for tests that check only its trajectory."""

from __future__ import annotations

from typing import Any

from memory.schema import Task, Trajectory
from runtime.agent.graph import Agent
from runtime.agent.turn import TurnRequest


async def play(agent: Agent, task: Task | None = None, **fields: Any) -> Trajectory:
    """Return the trajectory of one turn; `fields` are the other fields of its `TurnRequest`."""
    return (await agent.rollout(TurnRequest(task=task, **fields))).trajectory
