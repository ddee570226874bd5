"""Chooses which of a cycle's policies stands for promotion, by practice tasks that none of them was trained on.

Training metrics go on improving long after play has begun to get worse, so the loss cannot say when to stop. The choice
proves nothing: the release gate does, on held-out tasks. Flow: tasks -> play each policy as it would serve -> the best.
"""

from __future__ import annotations

from collections.abc import Sequence

from memory.datasets.examples import user_texts_of
from memory.schema import Task
from optimizer.cycle.artifacts import Selection
from optimizer.cycle.context import CycleContext

OVERSAMPLING = 4
"""Tasks listed per task wanted: some of them may have been played, and learned from, before."""


async def choose_policy(context: CycleContext, versions: Sequence[int]) -> int:
    """Return the version that wins most of the selection tasks; of equals the earlier in `versions`.

    Without selection tasks the last version is returned. Policies played before a crash are not played again.
    """
    tasks = await selection_tasks(context)
    if not tasks:
        return versions[-1]
    await context.prepare(tasks)
    serving = context.gate_serving(context.config.environment)
    before = context.artifacts.selection
    won = dict(before.num_won) if before is not None else {}
    for version in versions:
        # JSON keys are strings
        if str(version) in won:
            continue
        played = await context.play(
            tasks,
            policy=version,
            use_memory=serving.use_memory,
            temperature=serving.temperature,
            label=f"choosing a checkpoint: v{version}",
        )
        won[str(version)] = sum(context.is_success(trajectory) for trajectory in played)
        # after each version: a crash costs the episodes of one policy, not of all
        await context.save_artifacts(selection=Selection(num_tasks=len(tasks), num_won=won))
    # max returns the first of equals: `versions` begins with the least trained
    chosen = max(versions, key=lambda version: won[str(version)])
    await context.save_artifacts(selection=Selection(num_tasks=len(tasks), num_won=won, chosen=chosen))
    return chosen


async def selection_tasks(context: CycleContext) -> list[Task]:
    """Return practice tasks after those of this cycle that nothing was learned from."""
    config = context.config
    if not config.environment or not config.num_selection_tasks:
        return []
    # behind the practice tasks of this cycle, so that neither rows nor insights come from them
    start = context.artifacts.practice_end or config.num_practice_tasks
    # the next cycle's practice begins at the same offset, so these tasks may be trained on then, which harms nothing:
    # its selection lies further on
    tasks = context.take_practice(OVERSAMPLING * config.num_selection_tasks, start)
    names = context.artifacts.selection_tasks
    if names is None:
        learned_from = await _find_learned_from(context)
        # where the environment has few tasks, those behind this cycle's are this cycle's again
        learned_from |= {task.name for task in context.practice_tasks()}
        # saved, because the pool that excludes tasks grows between two tries of the stage
        names = [task.name for task in tasks if task.name not in learned_from][: config.num_selection_tasks]
        await context.save_artifacts(selection_tasks=names)
    return [task for task in tasks if task.name in set(names)]


async def _find_learned_from(context: CycleContext) -> set[str]:
    """Return the names of the tasks that rows may be made of: of episodes, corrections and imported examples."""
    played = [each.trajectory for each in (*await context.read_pool(), *await context.read_corrections())]
    learned_from = {each.task for each in played if each.environment == context.config.environment and each.task}
    for rows in (await context.read_examples()).values():
        for each in rows:
            row = each.example
            learned_from |= context.tasks_of(row.environment, row.task, user_texts_of(row))
    return learned_from
