"""Reads from the log the cells that the gate would have played: held-out tasks, as clients played them.

Flow: trajectories of the two policies -> the first try of each task -> tries made alike -> two cells.

Invariants: only episodes since the candidate exists count, so that both policies had the same memory to draw on. The
first try of a task counts, whatever its outcome: a task repeated until it is won would prove nothing. A try without a
reward counts as lost, because rewarding only good episodes would prove nothing either. Tasks that one policy alone
tried, or both but not alike, are left out and counted: whoever chose them may have known an outcome. Tasks that decided
about this candidate before do not count again. Only the default tenant's tries count, and of their rewards only those
by people who may teach the weights: policies serve all tenants, so no tenant's feedback may choose them for others.
"""

from __future__ import annotations

from collections.abc import Iterator

from memory.records.trajectories import TrajectoryWithReward
from memory.schema import Policy, Split
from memory.store import Memory
from optimizer.evaluation.cells import Cell, CellResult, describe

PAGE = 1000

Tries = dict[tuple[str, str, str], TrajectoryWithReward]
"""By task."""


def read_logged_cells(memory: Memory, candidate: Policy, incumbent: Policy) -> tuple[CellResult, CellResult]:
    """Return (candidate, incumbent). Reads the database: for a thread."""
    ours = _first_tries(memory, candidate, since=candidate)
    # since the candidate for both: the incumbent's older tries had less memory to draw on
    theirs = _first_tries(memory, incumbent, since=candidate)
    used = memory.verdicts.tasks_used(candidate.version)
    tried = [task for task in {**ours, **theirs} if _name(task) not in used]
    alike = [
        task
        for task in tried
        if task in ours and task in theirs and _conditions(ours[task]) == _conditions(theirs[task])
    ]
    num_unpaired = len(tried) - len(alike)
    return (
        _as_cell(memory, "candidate", candidate, {task: ours[task] for task in alike}, num_unpaired),
        _as_cell(memory, "incumbent", incumbent, {task: theirs[task] for task in alike}, num_unpaired),
    )


def _first_tries(memory: Memory, policy: Policy, *, since: Policy) -> Tries:
    # newest first, so that the last one in a dict is the first try; what this server plays itself, in an environment,
    # is no try of a client
    return {
        view.trajectory.task_key: view
        for view in _all_tries(memory, policy, since)
        if view.trajectory.environment is None
    }


def _all_tries(memory: Memory, policy: Policy, since: Policy) -> Iterator[TrajectoryWithReward]:
    # pages by id: rows that arrive meanwhile have higher ids and shift no page
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


def _conditions(view: TrajectoryWithReward) -> tuple[object, ...]:
    """Return the conditions that must be equal for two tries to differ by their policy alone."""
    # whether memory was shown, not what: the text differs with every episode
    return (view.trajectory.temperature, bool(view.trajectory.memory_text))


def _name(task: tuple[str, str, str]) -> str:
    return ": ".join(filter(None, task))


def _as_cell(memory: Memory, name: str, policy: Policy, tries: Tries, num_unpaired: int) -> CellResult:
    # any: with memory on, a try that found nothing to show has none
    uses_memory = any(view.trajectory.memory_text for view in tries.values())
    played = [
        describe(
            _name(task),
            view.trajectory,
            view.reward,
            memory.trajectories.success_reward,
            memory.trajectories.count_model_calls(view.trajectory.id),
        )
        for task, view in sorted(tries.items())
    ]
    cell = Cell(f"{name}-{'on' if uses_memory else 'off'}", policy.version, uses_memory)
    return CellResult(cell, played, num_unpaired)
