"""Plays the branches of a search: continuations from chosen steps of own episodes, each to the end of its task.

Flow: own episodes of the round -> points -> continuations of each -> where they ended differently, the same ones again.
Invariant: the points of a round are chosen once and saved, and the branches are counted by their rows, so that a
repeated stage plays only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from memory.errors import ReplayMismatch
from optimizer.cycle.context import CycleContext
from optimizer.cycle.stages import Method, name_round, read_episodes
from optimizer.data.branches import BranchPoint, Key, choose_points, group_branches, list_continuations
from optimizer.errors import CannotReplay
from optimizer.rewards import GradedTrajectory
from optimizer.seams import Branch, Seams

TEMPERATURE = 1.0
"""At which the policy's own distribution is sampled, as in the rounds of other methods."""


def require_replay(seams: Seams, environment: str, method: Method) -> Branch:
    """Return the function that plays branches. Raises CannotReplay, which names the environment."""
    branch = seams.branching(environment)
    if branch is None:
        raise CannotReplay(
            f"{method.title} replays episodes of {environment!r}, which does not start again in the same state: take "
            f"{method.name!r} out of optimizer.methods, or choose another environment"
        )
    return branch


async def play_branches(context: CycleContext, method: Method, policy: int, label: str) -> None:
    """Choose the points of this round and play their branches, unless that was done before."""
    graded = await read_episodes(context, method)
    if name_round(context, method) not in context.artifacts.branch_points:
        tried = group_branches(graded, policy).keys()
        points = choose_points(graded, policy=policy, config=context.config.branches, tried=tried)
        await _save_points(context, method, points)
    sampled = _find_missing_continuations(context, method, graded, policy)
    await _play_missing(context, method, graded, list(sampled), f"{label}: ways on")
    graded = await read_episodes(context, method)
    repeated = _find_missing_rollouts(context, method, graded, policy)
    await _play_missing(context, method, graded, list(repeated), f"{label}: the same ways again")


Missing = tuple[BranchPoint, Key, int, int]
"""(point, where the branches leave, how many there are, how many more are wanted)."""


def _find_missing_continuations(
    context: CycleContext, method: Method, graded: Sequence[GradedTrajectory], policy: int
) -> Iterator[Missing]:
    branches = group_branches(graded, policy)
    for point in _points(context, method):
        num_played = len(branches.get(point.key, ()))
        yield point, point.key, num_played, context.config.branches.num_ways - num_played


def _find_missing_rollouts(
    context: CycleContext, method: Method, graded: Sequence[GradedTrajectory], policy: int
) -> Iterator[Missing]:
    """Yield the continuations to be repeated: at points where they differ by the margin, unless they ended the task."""
    config, branches = context.config.branches, group_branches(graded, policy)
    own = {each.trajectory.id: each for each in graded}
    for point in _points(context, method):
        origin = own.get(point.trajectory_id)
        continuations = list_continuations(point, origin, branches) if origin is not None else []
        values = [each.value for each in continuations]
        if not values or max(values) - min(values) < config.margin:
            continue
        for each in continuations:
            if each.next_key is not None:
                yield point, each.next_key, each.num_rollouts, config.num_rollouts - each.num_rollouts


async def _play_missing(
    context: CycleContext,
    method: Method,
    graded: Sequence[GradedTrajectory],
    missing: Sequence[Missing],
    label: str,
) -> None:
    branch = require_replay(context.seams, context.config.environment, method)
    by_id = {each.trajectory.id: each.trajectory for each in graded}
    mismatches: dict[Key, str] = {}

    async def play_one(point: BranchPoint, leaves_at: Key, seed: int) -> None:
        if point.key in mismatches:
            return
        try:
            await branch(by_id[leaves_at[0]], position=leaves_at[1], temperature=TEMPERATURE, seed=seed)
        except ReplayMismatch as mismatch:
            mismatches[point.key] = str(mismatch)

    # the number played so far is part of the seed: what a repeated stage adds must be other samples
    episodes = [
        partial(play_one, point, key, context.seed("branch", *key, num_played, number))
        for point, key, num_played, num_missing in missing
        if point.mismatch is None
        for number in range(num_missing)
    ]
    await context.play_all(episodes, label)
    if mismatches:
        points = _points(context, method)
        marked = [it.model_copy(update={"mismatch": mismatches.get(it.key, it.mismatch)}) for it in points]
        await _save_points(context, method, marked)


def _points(context: CycleContext, method: Method) -> list[BranchPoint]:
    return context.artifacts.branch_points[name_round(context, method)]


async def _save_points(context: CycleContext, method: Method, points: Sequence[BranchPoint]) -> None:
    stored = {**context.artifacts.branch_points, name_round(context, method): points}
    dumped = {name: [point.model_dump() for point in those] for name, those in stored.items()}
    await context.save_artifacts(branch_points=dumped)
