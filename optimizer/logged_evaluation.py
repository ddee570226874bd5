"""Reads from the log what the gate would have played: held-out tasks, as clients played them by either policy.

Refuses to decide: `optimizer.evaluation.judge` does, by the same pairs, doubts and guards as for tasks played here.
Flow: trajectories of the two policies -> the newest try of each task -> tries made alike -> two cells.

Invariants: only what was lived since the candidate exists counts, so that both had the same memory to draw on; a try
without a reward stays in, as a doubt: who rewards only what went well proves nothing. Only the default tenant's tries
count, and of their rewards only those of whoever may teach the weights: policies are everybody's, and no tenant's
feedback shall choose them for the others.
"""

from __future__ import annotations

from typing import Any

from memory.schema import Policy, Split
from memory.trajectories import TrajectoryView
from optimizer.evaluation import Cell, CellResult, describe

Tries = dict[tuple[str, str], TrajectoryView]
"""By task."""


def read_logged_cells(
    memory: Any, candidate: Policy, incumbent: Policy, *, limit: int
) -> tuple[CellResult, CellResult]:
    """Return (candidate, incumbent), with the newest `limit` tries of each.

    Reads the database: for a thread.
    """
    ours = _newest_tries(memory, candidate, since=candidate, limit=limit)
    theirs = _newest_tries(memory, incumbent, since=candidate, limit=limit)
    alike = [task for task in ours if task in theirs and _conditions(ours[task]) == _conditions(theirs[task])]
    return tuple(
        _as_cell(memory, name, policy, {task: tries[task] for task in alike})
        for name, policy, tries in (("candidate", candidate, ours), ("incumbent", incumbent, theirs))
    )


def _newest_tries(memory: Any, policy: Policy, *, since: Policy, limit: int) -> Tries:
    views = memory.trajectories.list(
        split=Split.HELD_OUT, policy=policy.version, since=since.created_at, limit=limit, tenant="", is_for_weights=True
    )
    return {view.trajectory.task_key: view for view in reversed(views)}


def _conditions(view: TrajectoryView) -> tuple[Any, ...]:
    """What must be the same for two tries to differ by their policy alone."""
    return (view.trajectory.temperature, bool(view.trajectory.memory_text))


def _as_cell(memory: Any, name: str, policy: Policy, tries: Tries) -> CellResult:
    uses_memory = any(view.trajectory.memory_text for view in tries.values())
    played = [
        describe(": ".join(filter(None, task)), view.trajectory, view.reward, memory.trajectories.success_reward)
        for task, view in sorted(tries.items())
    ]
    return CellResult(Cell(f"{name}-{'on' if uses_memory else 'off'}", policy.version, uses_memory), played)
