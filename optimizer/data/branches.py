"""Chooses the steps at which a search branches, and builds preferences from the branches: two replies to one prompt,
each valued by playing on from it.

Pure functions. After Agent Q (arXiv 2408.07199). Departures: the steps are chosen at once from whole episodes instead
of by a tree's bounds, and a reply is worth the mean reward of its rollouts alone: no critic ranks it beforehand.
Invariants: both sides of a preference have the token ids that the engine captured behind one and the same captured
prompt; nothing but the reply itself is trained. Hazard: a reply that was tried once may owe its reward to later steps.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, permutations, zip_longest
from typing import Any

from pydantic import BaseModel, ConfigDict

from memory.schema import Split, Step
from optimizer.config import BranchConfig, TeachingConfig
from optimizer.data.groups import require_played_by
from optimizer.data.needs import LoggedData, Need
from optimizer.data.preferences import Preference
from optimizer.data.rows import BuiltRows, Material, bound_rows, list_counts, require_trusted
from optimizer.data.stitching import Unstitchable
from optimizer.rewards import GradedTrajectory, refuse_held_out

Key = tuple[str, int]
"""(trajectory, position of the step at which branches leave it)."""
Branches = Mapping[Key, Sequence[GradedTrajectory]]
"""The branches by where they leave their origin."""


class BranchPoint(BaseModel):
    """A model call of an own episode that a search answers anew. It is stored in the artifacts of a cycle."""

    model_config = ConfigDict(frozen=True)

    trajectory_id: str
    position: int
    mismatch: str | None = None
    """How a replay up to here differed from the recorded episode; then nothing is learned here."""

    @property
    def key(self) -> Key:
        return self.trajectory_id, self.position


@dataclass
class BranchRows(BuiltRows[Preference]):
    """Preferences between continuations, and the reasons for which everything else was left out."""

    num_points: int = 0
    num_mismatches: int = 0
    """Points whose replay differed from the recorded episode."""
    num_branches: int = 0
    num_own: int = 0
    """Own episodes that could be branched from."""
    origins: dict[str, str] = field(default_factory=dict)
    """The origin of each branch, by its id."""

    @property
    def trajectory_ids(self) -> list[str]:
        sides = {id_ for row in self.rows for id_ in (row.chosen_trajectory_id, row.rejected_trajectory_id)}
        return sorted(sides | {self.origins[id_] for id_ in sides})

    def details(self) -> dict[str, object]:
        return {
            "num_points": self.num_points,
            "num_mismatches": self.num_mismatches,
            "num_branches": self.num_branches,
            "num_own": self.num_own,
        }


def measure_need(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for preferences between continuations, all of them still to be played."""
    wanted, num_tasks = logged.config.branches, logged.config.num_practice_tasks
    num_own = min(wanted.num_tasks, num_tasks) * wanted.num_tries
    num_branches = wanted.num_points * wanted.num_ways * wanted.num_rollouts
    return Need(
        name="branches",
        needed=wanted.min_rows,
        available=0,
        # of a point at the most: one half of its continuations better than each of the other half
        playable=wanted.num_points * (wanted.num_ways**2 // 4),
        detail=f"each of {wanted.rounds} rounds plays {num_own} own episodes and at most {num_branches} branches of "
        f"them ({wanted.num_points} steps, {wanted.num_ways} ways on from each, {wanted.num_rollouts} episodes for a "
        f"way), {wanted.rounds * (num_own + num_branches)} episodes at the most in all",
        mend="raise branches.num_points or branches.num_ways, or lower branches.min_rows",
    )


def build(material: Material) -> BranchRows:
    """Return the preferences of one round."""
    return build_branches(
        material.trajectories,
        policy=material.policy,
        points=material.branch_points,
        config=material.config.branches,
        max_length_tokens=material.max_length_tokens,
        seed=material.config.seed,
        teaching=material.config.teaching,
    )


def describe(summary: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a report about branches; `summary` as the cycle's row stores it."""
    return [
        f"{summary['num_rows']} preferences of {summary['num_tasks']} tasks from {summary['num_branches']} branches at "
        f"{summary['num_points']} steps of {summary['num_own']} own episodes in the last round; "
        f"{summary['num_mismatches']} of these steps were dropped, because the environment did not answer the replayed "
        f"calls as before ({list_counts(summary['tally'])})."
    ]


def choose_points(
    graded: Iterable[GradedTrajectory], *, policy: int, config: BranchConfig, tried: Collection[Key] = ()
) -> list[BranchPoint]:
    """Return at most `config.num_points` model calls of lost own episodes, the most informative first.

    Of a task, first the calls that its tries answered differently: there the policy is undecided, so another sample is
    likely to be another reply. Then the calls of each lost try, the middle one first, then the middles of both halves,
    and so on: somewhere before the end lies the mistake. Tasks take turns, those that were also won before the others.
    A task that was never lost has nothing to search for.
    """
    by_task: dict[tuple[str, ...], list[GradedTrajectory]] = defaultdict(list)
    for each in _take_own(graded, policy):
        by_task[each.trajectory.task_key].append(each)
    lost = {task: tries for task, tries in by_task.items() if not all(each.is_success for each in tries)}
    turns = sorted(lost, key=lambda task: (not any(each.is_success for each in lost[task]), task))
    queues = [[point for point in _list_points(lost[task]) if point.key not in tried] for task in turns]
    chosen = [point for points in zip_longest(*queues) for point in points if point is not None]
    return chosen[: config.num_points]


def _take_own(graded: Iterable[GradedTrajectory], policy: int) -> Iterator[GradedTrajectory]:
    """Yield the practice episodes that a search of this policy may branch from, oldest first."""
    for each in sorted(graded, key=lambda each: each.trajectory.id):
        trajectory = each.trajectory
        try:
            require_played_by(each, policy)
        except Unstitchable:
            continue
        # a replay would take a plan for a reply
        if any(step.role is not None for step in each.steps):
            continue
        # a client's episode is its owner's: nobody else goes on with it
        is_clients = bool(trajectory.tenant or trajectory.user_id or trajectory.key_id)
        if trajectory.branch_of is None and trajectory.split is Split.PRACTICE and not is_clients:
            yield each


def _list_points(tries: Sequence[GradedTrajectory]) -> list[BranchPoint]:
    """Return the model calls of the lost tries of a task, one for each prompt, in the order of `choose_points`."""
    replies: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    for step in chain.from_iterable(each.model_steps for each in tries):
        replies[_prompt_of(step)].add(_reply_of(step))
    lost = [each.model_steps for each in tries if not each.is_success]
    halved = chain.from_iterable(zip_longest(*(_halve(steps) for steps in lost)))
    ordered = [step for step in halved if step is not None and step.prompt_token_ids and step.output_token_ids]
    # stable: within both kinds the order stays
    ordered.sort(key=lambda step: len(replies[_prompt_of(step)]) == 1)
    # the first step of each prompt: two tries may have come to the same
    first = {_prompt_of(step): step for step in reversed(ordered)}
    kept = [step for step in ordered if first[_prompt_of(step)] is step]
    return [BranchPoint(trajectory_id=step.trajectory_id, position=step.position) for step in kept]


def _halve(steps: Sequence[Step]) -> list[Step]:
    """Return the steps, the middle one first, then the middles of both halves, and so on."""
    ordered, parts = [], [steps]
    for part in parts:  # it grows
        if part:
            middle = len(part) // 2
            ordered.append(part[middle])
            parts += [part[:middle], part[middle + 1 :]]
    return ordered


def _prompt_of(step: Step) -> tuple[int, ...]:
    return tuple(step.prompt_token_ids or ())


def _reply_of(step: Step) -> tuple[int, ...]:
    return tuple(step.output_token_ids or ())


@dataclass
class Continuation:
    """One reply to the prompt of a branch point, and the episodes that value it."""

    reply: tuple[int, ...]
    branches: list[GradedTrajectory] = field(default_factory=list)
    """Those that gave this reply, by id."""
    repeated: list[GradedTrajectory] = field(default_factory=list)
    """Those that replay it and play on: branches of its branches."""

    @property
    def num_rollouts(self) -> int:
        return len(self.branches) + len(self.repeated)

    @property
    def value(self) -> float:
        """The mean reward."""
        return sum(each.reward for each in [*self.branches, *self.repeated]) / self.num_rollouts

    @property
    def next_key(self) -> Key | None:
        """Where its reply can be played on from; None where it ended the task: then its reward is exact."""
        return next((key for each in self.branches if (key := _next_key(each)) is not None), None)


def group_branches(graded: Iterable[GradedTrajectory], policy: int) -> dict[Key, list[GradedTrajectory]]:
    """Return the branches that a policy played, by where they leave their origin."""
    branches: dict[Key, list[GradedTrajectory]] = defaultdict(list)
    for each in sorted(graded, key=lambda each: each.trajectory.id):
        origin, position = each.trajectory.branch_of, each.trajectory.branch_position
        if origin is not None and position is not None and each.trajectory.policy == policy:
            branches[origin, position].append(each)
    return branches


def list_continuations(
    point: BranchPoint, origin: GradedTrajectory, branches: Branches, counts: Counter[str] | None = None
) -> list[Continuation]:
    """Return the different replies that branches gave at a point, and what followed; `counts` gets what is left out."""
    counts = Counter() if counts is None else counts
    asked = next((step for step in origin.model_steps if step.position == point.position), None)
    continuations: dict[tuple[int, ...], Continuation] = {}
    for each in branches.get(point.key, ()):
        step = _own_steps(each)[0] if _own_steps(each) else None
        try:
            require_trusted(each)
            if step is None or not step.output_token_ids:
                raise Unstitchable("no_token_ids")
            # token by token: only equal tokens are one prompt
            if asked is None or step.prompt_token_ids != asked.prompt_token_ids:
                raise Unstitchable("prompts_differ")
        except Unstitchable as reason:
            counts[str(reason)] += 1
            continue
        continuations.setdefault(_reply_of(step), Continuation(_reply_of(step))).branches.append(each)
    for continuation in continuations.values():
        keys = filter(None, map(_next_key, continuation.branches))
        continuation.repeated = [it for key in keys for it in branches.get(key, ()) if it.trajectory.may_teach]
    return [continuations[reply] for reply in sorted(continuations)]


def _own_steps(branch: GradedTrajectory) -> list[Step]:
    """Return the model calls of a branch that are not replayed."""
    start = branch.trajectory.branch_position or 0
    return [step for step in branch.model_steps if step.position >= start]


def _next_key(branch: GradedTrajectory) -> Key | None:
    own = _own_steps(branch)
    return (branch.trajectory.id, own[1].position) if len(own) > 1 else None


def build_branches(
    graded: Iterable[GradedTrajectory],
    *,
    policy: int,
    points: Sequence[BranchPoint],
    config: BranchConfig,
    max_length_tokens: int,
    seed: int = 0,
    teaching: TeachingConfig | None = None,
) -> BranchRows:
    """Return a preference for each two replies at a point whose mean rewards differ by `config.margin` or more."""
    graded = list(graded)
    refuse_held_out(graded)
    built = BranchRows(num_points=len(points), num_own=len(list(_take_own(graded, policy))))
    built.counts["by_a_team"] = sum(any(step.role is not None for step in each.steps) for each in graded)
    own = {each.trajectory.id: each for each in graded}
    branches = group_branches(graded, policy)
    built.origins = {each.trajectory.id: origin for (origin, _), those in branches.items() for each in those}
    built.num_branches = len(built.origins)
    tasks = set()
    for point in points:
        if point.mismatch is not None:
            built.num_mismatches += 1
            continue
        origin = own.get(point.trajectory_id)
        if origin is None:  # over the limit of the pool
            built.counts["no_origin"] += 1
            continue
        continuations = list_continuations(point, origin, branches, built.counts)
        if _add_preferences(continuations, config, max_length_tokens, built):
            tasks.add(origin.trajectory.task_key)
    built.num_tasks = len(tasks)
    bound_rows(built, config, teaching or TeachingConfig(), seed)
    return built


def _add_preferences(
    continuations: Sequence[Continuation], config: BranchConfig, max_length_tokens: int, built: BranchRows
) -> bool:
    """Add the preferences between the continuations of one point; return whether there is one."""
    pairs = [(it, other) for it, other in permutations(continuations, 2) if it.value - other.value >= config.margin]
    if not pairs:
        built.counts["one_way" if len(continuations) < 2 else "ways_alike"] += 1
    num_before = len(built.rows)
    for better, worse in pairs:
        chosen, rejected = better.branches[0], worse.branches[0]
        asked = _own_steps(chosen)[0]
        # a reply cut by a limit has no end token: preferred, it teaches to break off
        if asked.finish_reason == "length":
            built.counts["cut_output"] += 1
            continue
        prompt = list(asked.prompt_token_ids or ())
        if len(prompt) + max(len(better.reply), len(worse.reply)) > max_length_tokens:
            built.counts["too_long"] += 1
            continue
        built.rows.append(
            Preference(
                chosen_trajectory_id=chosen.trajectory.id,
                rejected_trajectory_id=rejected.trajectory.id,
                prompt_ids=prompt,
                chosen_ids=list(better.reply),
                chosen_mask=[1] * len(better.reply),
                rejected_ids=list(worse.reply),
                rejected_mask=[1] * len(worse.reply),
            )
        )
        built.teachers.append((chosen.teacher, rejected.teacher))
    return len(built.rows) > num_before
