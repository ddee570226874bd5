"""Builds rows for on-policy distillation: own rollouts without memory, beside the same tokens behind a prompt with it.

Pure functions. The teacher is the policy itself with its memory in view, so the rows teach what memory would have said
(on-policy context distillation, arXiv 2602.12275). Hazard: a memory that does not help would be taught all the same,
and models that gain nothing from context are made worse by this, so rows are built only where memory wins more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memory.team import Role
from optimizer.config import RolloutConfig, TeachingConfig
from optimizer.data.groups import is_sampled, require_sampled_by
from optimizer.data.needs import LoggedData, Need
from optimizer.data.roles import split_roles
from optimizer.data.rows import BuiltRows, Material, bound_rows, list_counts
from optimizer.data.stitching import Tokenizer, Unstitchable, align_logprobs, insert_memory, stitch
from optimizer.rewards import GradedTrajectory, refuse_held_out


@dataclass(frozen=True)
class ScoredRollout:
    """One row of a rollout, and the same tokens as the teacher sees them; the loss counts where `mask` is 1.

    `teacher_ids` is longer by the memory segment, which lies in the prompt: the ends of both are the same.
    """

    trajectory_id: str
    input_ids: list[int]
    mask: list[int]
    teacher_ids: list[int]
    sampled_logps: list[float] | None = None
    """As in `RolloutRow`."""


@dataclass
class ScoredRolloutRows(BuiltRows[ScoredRollout]):
    """Rollouts for a teacher to score, and the reasons for which everything else was left out."""

    won_with_memory: float = 0.0
    won_without: float = 0.0
    """Mean rewards of the policy on the same tasks."""

    @property
    def trajectory_ids(self) -> list[str]:
        return sorted({row.trajectory_id for row in self.rows})

    @property
    def num_examples(self) -> int:
        return len(self.trajectory_ids)

    def details(self) -> dict[str, object]:
        return {"won_with_memory": self.won_with_memory, "won_without": self.won_without}


def measure_need(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for own rollouts of tasks for which memory has something to show, all still to be played."""
    wanted, num_tasks = logged.config.rollouts, logged.config.num_practice_tasks
    playable = min(wanted.num_tasks, num_tasks) * wanted.num_tries
    return Need(
        name="rollouts",
        needed=wanted.min_rows,
        available=0,
        playable=playable,
        detail=f"each round plays {playable} rollouts without memory and as many with it; those of tasks with a memory "
        "count, if memory wins more",
        mend="raise rollouts.num_tasks or rollouts.num_tries, or lower rollouts.min_rows",
    )


def build(material: Material) -> ScoredRolloutRows:
    """Return the scored rollouts of one round."""
    return build_rollouts(
        material.trajectories,
        material.tokenizer,
        policy=material.policy,
        config=material.config.rollouts,
        max_length_tokens=material.max_length_tokens,
        seed=material.config.seed,
        teaching=material.config.teaching,
    )


def describe(summary: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a report about scored rollouts; `summary` as the cycle's row stores it."""
    return [
        f"{summary['num_rows']} own rollouts of {summary['num_tasks']} tasks, to be scored with memory in view, in the "
        f"last round: mean reward {summary['won_with_memory']:.1%} with memory and {summary['won_without']:.1%} "
        f"without ({list_counts(summary['tally'])})."
    ]


def build_rollouts(
    graded: Iterable[GradedTrajectory],
    tokenizer: Tokenizer,
    *,
    policy: int,
    config: RolloutConfig,
    max_length_tokens: int,
    seed: int = 0,
    teaching: TeachingConfig | None = None,
) -> ScoredRolloutRows:
    """Return the rollouts of `policy` without memory, each with the memory that the same policy was shown for the same
    task; nothing where it did not win more with memory than without."""
    graded = list(graded)
    refuse_held_out(graded)
    # memory is shown to the actor alone, so it has nothing to teach to the others
    graded = [part for part in split_roles(graded) if part.role is Role.ACTOR]
    built = ScoredRolloutRows()
    shown = _find_memories(graded, policy)
    own: list[GradedTrajectory] = []
    for each in graded:
        if each.trajectory.policy == policy and each.trajectory.memory_text:
            continue
        try:
            require_sampled_by(each, policy)
            if each.trajectory.task_key not in shown:
                raise Unstitchable("no_memory")
        except Unstitchable as reason:
            built.counts[str(reason)] += 1
            continue
        own.append(each)
    tasks = {each.trajectory.task_key for each in own}
    built.won_without = _mean([each.reward for each in own])
    built.won_with_memory = _mean([it.reward for task in tasks for it in shown[task]])
    if own and built.won_with_memory <= built.won_without:
        built.counts["memory_did_not_help"] += len(own)
        own = []
    for each in own:
        memory_text = shown[each.trajectory.task_key][-1].trajectory.memory_text
        rows = _score_rows(each, memory_text, tokenizer, max_length_tokens, built.counts)
        built.rows += rows
        built.teachers += [(each.teacher,)] * len(rows)
    built.num_tasks = len({each.trajectory.task_key for each in own})
    bound_rows(built, config, teaching or TeachingConfig(), seed)
    return built


def _find_memories(
    graded: Sequence[GradedTrajectory], policy: int
) -> dict[tuple[str, str, str], list[GradedTrajectory]]:
    """Return the episodes that a policy sampled with memory, by task, oldest first."""
    shown: dict[tuple[str, str, str], list[GradedTrajectory]] = {}
    for each in sorted(graded, key=lambda each: each.trajectory.id):
        trajectory = each.trajectory
        if trajectory.policy == policy and trajectory.memory_text and trajectory.may_teach and is_sampled(each):
            shown.setdefault(trajectory.task_key, []).append(each)
    return shown


def _mean(rewards: Sequence[float]) -> float:
    return sum(rewards) / len(rewards) if rewards else 0.0


def _score_rows(
    each: GradedTrajectory, memory_text: str, tokenizer: Tokenizer, max_length_tokens: int, counts: Counter[str]
) -> list[ScoredRollout]:
    rows = []
    try:
        for row in stitch(each.steps)[0]:
            taught = insert_memory(row, each.trajectory, memory_text, tokenizer)
            if len(taught.input_ids) > max_length_tokens:
                raise Unstitchable("too_long")
            sampled = align_logprobs(row, each.steps)
            rows.append(ScoredRollout(each.trajectory.id, row.input_ids, row.mask, taught.input_ids, sampled))
    except Unstitchable as reason:
        counts[str(reason)] += 1
    return rows
