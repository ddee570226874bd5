"""Reads from the log what the gate would have played: held-out tasks, as clients played them by either policy.

Flow: trajectories of the two policies -> the first try of each task -> tries made alike -> two cells.

Invariants: only what was lived since the candidate exists counts, so that both had the same memory to draw on. The
first try of a task counts, whatever came of it: who could play again until it is won would prove nothing. So do tries
without a reward, as lost: who rewards only what went well proves nothing either. Tasks that decided on this candidate
before do not count again. Only the default tenant's tries count, and of their rewards only those of whoever may teach
the weights: policies are everybody's, and no tenant's feedback shall choose them for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memory.records.trajectories import TrajectoryView
from memory.schema import Policy, Split
from optimizer.evaluation.cells import Cell, CellResult, describe

PAGE = 1000

Tries = dict[tuple[str, str], TrajectoryView]
"""By task."""


def read_logged_cells(memory: Any, candidate: Policy, incumbent: Policy) -> tuple[CellResult, CellResult]:
    """Return (candidate, incumbent). Reads the database: for a thread."""
    ours = _first_tries(memory, candidate, since=candidate)
    theirs = _first_tries(memory, incumbent, since=candidate)
    used = memory.verdicts.tasks_used(candidate.version)
    alike = [
        task
        for task in ours
        if task in theirs and _conditions(ours[task]) == _conditions(theirs[task]) and _name(task) not in used
    ]
    return tuple(
        _as_cell(memory, name, policy, {task: tries[task] for task in alike})
        for name, policy, tries in (("candidate", candidate, ours), ("incumbent", incumbent, theirs))
    )


def _first_tries(memory: Any, policy: Policy, *, since: Policy) -> Tries:
    # newest first, so that what comes last is the first try
    return {view.trajectory.task_key: view for view in _all_tries(memory, policy, since)}


def _all_tries(memory: Any, policy: Policy, since: Policy) -> Iterator[TrajectoryView]:
    before_id = None
    while True:
        page = memory.trajectories.select(
            split=Split.HELD_OUT,
            policy=policy.version,
            since=since.created_at,
            limit=PAGE,
            before_id=before_id,
            tenant="",
            is_for_weights=True,
        )
        yield from page
        if len(page) < PAGE:
            return
        before_id = page[-1].trajectory.id


def _conditions(view: TrajectoryView) -> tuple[Any, ...]:
    """What must be the same for two tries to differ by their policy alone."""
    return (view.trajectory.temperature, bool(view.trajectory.memory_text))


def _name(task: tuple[str, str]) -> str:
    return ": ".join(filter(None, task))


def _as_cell(memory: Any, name: str, policy: Policy, tries: Tries) -> CellResult:
    uses_memory = any(view.trajectory.memory_text for view in tries.values())
    played = [
        describe(
            _name(task),
            view.trajectory,
            view.reward,
            memory.trajectories.success_reward,
            num_model_calls=memory.trajectories.measure(view.trajectory.id).num_model_calls,
        )
        for task, view in sorted(tries.items())
    ]
    return CellResult(Cell(f"{name}-{'on' if uses_memory else 'off'}", policy.version, uses_memory), played)
