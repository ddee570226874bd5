"""Chooses which of a cycle's policies stands for promotion, by practice tasks that none of them was trained on.

Training rewards rise long after play has begun to fall, so the loss cannot say when to stop. The choice here is no
proof: that is the release gate's, on held-out tasks. Flow: tasks -> play each policy as it would serve -> the best.
"""

from __future__ import annotations

from collections.abc import Sequence

from memory.schema import Split, Task
from optimizer.cycle.context import Workshop

OVERSAMPLING = 4
"""Of the tasks looked at, so many for each that is wanted: some may have been played, and learned from, before."""


async def choose_policy(shop: Workshop, versions: Sequence[int]) -> int:
    """Return the version that wins most of the selection tasks; of equals the earlier in `versions`.

    Where there is nothing to play, the last one. Policies that were played before a crash are not played again.
    """
    tasks = await selection_tasks(shop)
    if not tasks:
        return versions[-1]
    await shop.prepare(tasks)
    serving = shop.gate_serving(shop.config.environment)
    won = dict(shop.artifacts.get("selection", {}).get("num_won", {}))
    for version in versions:
        if str(version) in won:
            continue
        played = await shop.play(
            tasks,
            policy=version,
            use_memory=serving.use_memory,
            temperature=serving.temperature,
            label=f"choosing a checkpoint: v{version}",
        )
        won[str(version)] = sum(shop.is_success(trajectory) for trajectory in played)
        await shop.keep(selection={"num_tasks": len(tasks), "num_won": won})
    chosen = max(versions, key=lambda version: won[str(version)])
    await shop.keep(selection={"num_tasks": len(tasks), "num_won": won, "chosen": chosen})
    return chosen


async def selection_tasks(shop: Workshop) -> list[Task]:
    """Return practice tasks behind this cycle's own that no episode of the pool has played."""
    config = shop.config
    if not config.environment or not config.num_selection_tasks:
        return []
    start = shop.artifacts.get("practice_end", config.num_practice_tasks)
    found = shop.seams.tasks(config.environment, Split.PRACTICE, OVERSAMPLING * config.num_selection_tasks, start)
    names = shop.artifacts.get("selection_tasks")
    if names is None:
        learned_from = {each.trajectory.task for each in await shop.read_pool()}
        names = [task.name for task in found if task.name not in learned_from][: config.num_selection_tasks]
        await shop.keep(selection_tasks=names)
    return [task for task in found if task.name in set(names)]
