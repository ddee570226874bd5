"""Builds groups: several own rollouts of one task, each with its advantage over the others.

Pure functions. Only rollouts of the policy that will be trained count, without memory, at temperature 1: then the
log-probs that this policy gives to the rows are those that they were sampled with.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memory.records.trajectories import measure
from optimizer.config import GroupConfig, TeachingConfig
from optimizer.data.needs import LoggedData, Need
from optimizer.data.roles import RolePart, split_roles
from optimizer.data.rows import BuiltRows, Material, bound_rows, list_counts, require_trusted
from optimizer.data.stitching import Unstitchable, align_logprobs, stitch
from optimizer.rewards import GradedTrajectory, refuse_held_out

LEAST_SPREAD = 1e-6
"""Between the rewards of a group; with less, all advantages are 0 and nothing is learned."""
MOST_OF_LEAD = 0.5
"""Share of a rollout's lead that tokens can cost. Below 1, or a long success would equal a worse rollout."""


@dataclass(frozen=True)
class RolloutRow:
    """One row of a rollout; where `mask` is 1, its tokens become likelier or unlikelier by `advantage`."""

    trajectory_id: str
    input_ids: list[int]
    mask: list[int]
    advantage: float
    sampled_logps: list[float] | None = None
    """With which the engine sampled each token, 0 where it is not own; None where they were not kept."""


@dataclass
class GroupRows(BuiltRows[RolloutRow]):
    """Rollouts in groups, and the reasons for which everything else was left out."""

    num_groups: int = 0
    """Groups whose rewards differ and that have rows; those of a team's roles in one task count once."""
    mean_reward: float = 0.0
    """Of all rollouts of the policy, those of groups without a difference included; tokens are not priced in it."""

    @property
    def trajectory_ids(self) -> list[str]:
        return sorted({row.trajectory_id for row in self.rows})

    @property
    def num_examples(self) -> int:
        return self.num_groups

    def details(self) -> dict[str, object]:
        return {"num_groups": self.num_groups, "mean_reward": self.mean_reward}


def measure_need(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for tasks whose rollouts differ in reward, all of them still to be played."""
    wanted, num_tasks = logged.config.groups, logged.config.num_practice_tasks
    return Need(
        name="groups",
        needed=wanted.min_rows,
        available=0,
        playable=min(wanted.num_tasks, num_tasks),
        detail=f"each round tries {min(wanted.num_tasks, num_tasks)} practice tasks {wanted.num_tries} times; those "
        "whose tries are rewarded differently count",
        mend="raise groups.num_tasks and num_practice_tasks, or lower groups.min_rows",
    )


def build(material: Material) -> GroupRows:
    """Return the groups of one round."""
    return build_groups(
        material.trajectories,
        policy=material.policy,
        config=material.config.groups,
        max_length_tokens=material.max_length_tokens,
        seed=material.config.seed,
        teaching=material.config.teaching,
    )


def describe(summary: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a report about groups; `summary` as the cycle's row stores it."""
    return [
        f"{summary['num_groups']} groups of own rollouts of {summary['num_tasks']} tasks in the last round "
        f"({summary['mean_reward']:.1%} mean reward; {list_counts(summary['tally'])})."
    ]


def build_groups(
    graded: Iterable[GradedTrajectory],
    *,
    policy: int,
    config: GroupConfig,
    max_length_tokens: int,
    seed: int = 0,
    teaching: TeachingConfig | None = None,
) -> GroupRows:
    """Return the rollouts of `policy`, each with its leave-one-out advantage (RLOO, arXiv 2402.14740): its reward less
    the mean of the others of its task.

    That mean does not depend on the rollout itself, so it makes the gradient less noisy and leaves it as it is on
    average; the advantage is not divided by the spread of a group, which would weigh up the tasks that are nearly
    always or nearly never won (Dr. GRPO, arXiv 2503.20783).

    `config.token_price` makes tokens cost a share of the reward, after OPTIMA (arXiv 2410.08115); see `price_tokens`.
    """
    graded = list(graded)
    refuse_held_out(graded)
    built = GroupRows()
    own: list[GradedTrajectory] = []
    for each in graded:
        try:
            require_sampled_by(each, policy)
        except Unstitchable as reason:
            built.counts[str(reason)] += 1
            continue
        own.append(each)
    built.mean_reward = sum(each.reward for each in own) / len(own) if own else 0.0
    for _, tries in sorted(_group_tries(split_roles(own)).items()):
        # all roles' tokens: a long plan costs the actor, too
        num_tokens = [measure(parts[0].episode.steps).output_tokens for parts in tries]
        rewards = price_tokens([_mean_reward(parts) for parts in tries], num_tokens, config.token_price)
        if max(rewards) - min(rewards) < LEAST_SPREAD:
            built.counts["no_variance"] += 1
            continue
        for parts, advantage in zip(tries, leave_one_out(rewards), strict=True):
            for each in parts:
                rows = _take_rows(each, advantage, max_length_tokens, built.counts)
                built.rows += rows
                built.teachers += [(each.teacher,)] * len(rows)
    bound_rows(built, config, teaching or TeachingConfig(), seed)
    # of the rows that are left: a group without any teaches nothing
    tasks = {each.trajectory.id: each.trajectory.task_key for each in own}
    built.num_tasks = built.num_groups = len({tasks[row.trajectory_id] for row in built.rows})
    return built


def _group_tries(parts: Iterable[RolePart]) -> dict[tuple[str, ...], list[list[RolePart]]]:
    """Return the parts of each rollout, by task and role: several where the checker was asked more than once."""
    tries: dict[tuple[str, ...], dict[str, list[RolePart]]] = defaultdict(lambda: defaultdict(list))
    for part in parts:
        tries[part.task_key][part.trajectory.id].append(part)
    return {key: list(by_rollout.values()) for key, by_rollout in tries.items()}


def _mean_reward(parts: Sequence[RolePart]) -> float:
    return sum(part.reward for part in parts) / len(parts)


def price_tokens(rewards: Sequence[float], num_tokens: Sequence[int], token_price: float) -> list[float]:
    """Return the rewards of one task's rollouts less the price of their tokens.

    OPTIMA subtracts tokens from the reward. Here they cost a share of a rollout's lead: its reward less the next lower
    one of its task, or less 0 where it is the lowest. So the order of different rewards stays, at any price; a rollout
    without reward stays at 0, so that nothing is gained by failing sooner; and every rollout keeps half of its reward.
    """
    levels = sorted({0.0, *rewards})
    lower = dict(zip(levels[1:], levels, strict=False))
    return [
        reward - min(MOST_OF_LEAD, token_price * length / 1000) * (reward - lower.get(reward, 0.0))
        for reward, length in zip(rewards, num_tokens, strict=True)
    ]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Return each reward less the mean of the others; there are at least two."""
    total = sum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def require_played_by(each: GradedTrajectory, policy: int) -> None:
    """Raise Unstitchable for an episode that another policy played, or this one with memory in its prompt."""
    if each.trajectory.policy != policy:
        raise Unstitchable("other_policy")
    if each.trajectory.memory_text:
        raise Unstitchable("with_memory")
    require_trusted(each)


def require_sampled_by(each: GradedTrajectory, policy: int) -> None:
    """Raise Unstitchable for an episode whose tokens this policy did not sample as they are scored: without memory, at
    temperature 1."""
    require_played_by(each, policy)
    if not is_sampled(each):
        raise Unstitchable("other_temperature")


def is_sampled(each: GradedTrajectory) -> bool:
    """Whether an episode was played at temperature 1."""
    # None: not recorded; the rounds of a cycle play at 1
    return each.trajectory.temperature in (None, 1.0)


def _take_rows(
    each: GradedTrajectory, advantage: float, max_length_tokens: int, counts: Counter[str]
) -> list[RolloutRow]:
    try:
        stitched, _ = stitch(each.steps)
    except Unstitchable as reason:
        counts[str(reason)] += 1
        return []
    rows = [row for row in stitched if len(row.input_ids) <= max_length_tokens]
    counts["too_long"] += len(stitched) - len(rows)
    return [
        RolloutRow(each.trajectory.id, row.input_ids, row.mask, advantage, align_logprobs(row, each.steps))
        for row in rows
    ]
