"""Live tasks that clients hold out, so that they only measure: by name, or by the text of their question.

Hazard: texts are compared word by word, so a question in other words is another task.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import Row

from memory.schema import Trajectory

HeldOut = Collection[tuple[str, str]]
"""(tenant, task) and (tenant, task text), normalized; as `Trajectories.held_out_tasks` returns them."""


def normalize_text(text: str) -> str:
    """Return a text as it is compared: its words, whatever space is around them."""
    return " ".join(text.split())


def is_held_out_by_clients(
    held_out: HeldOut, tenant: str, environment: str | None, task: str | None, texts: Iterable[str]
) -> bool:
    """Whether a live task, or a row with these users' texts, is among those that clients hold out: tenant by tenant, so
    that no tenant can withhold another's log from learning."""
    if environment:
        return False
    return any((tenant, normalize_text(it)) in held_out for it in (task or "", *texts))


def is_episode_held_out(held_out: HeldOut, trajectory: Trajectory | Row[Any]) -> bool:
    """Whether clients hold out the task of an episode; of a row, its columns are read."""
    it = trajectory
    return is_held_out_by_clients(held_out, it.tenant, it.environment, it.task, [it.task_text])
