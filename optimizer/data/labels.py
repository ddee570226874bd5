"""Builds labels: rows of tokens that are good or bad by themselves, without a pair, from thumbs and other rewards.

Pure functions. A whole episode is judged, so each of its own tokens carries the label; the rest of the conversation is
context. Hazard: one kind alone teaches nothing but to become likelier or unlikelier, so the rarer kind decides whether
there is enough (`num_examples`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memory.datasets.examples import TaughtExample
from memory.formats.content import ExampleKind
from memory.records.feedback import Correction
from optimizer.config import LabelConfig, TeachingConfig
from optimizer.data.examples import render_examples
from optimizer.data.needs import LoggedData, Need, count_capped
from optimizer.data.roles import RolePart, split_roles
from optimizer.data.rows import (
    BuiltRows,
    Material,
    bound_rows,
    describe_own_tokens,
    list_counts,
    require_imitable,
    require_trusted,
)
from optimizer.data.stitching import RERENDER_MISMATCH, Tokenizer, Unstitchable, remove_memory, stitch
from optimizer.rewards import GradedTrajectory, refuse_held_out


@dataclass(frozen=True)
class Label:
    """One row that is good or bad; the loss counts where `mask` is 1."""

    trajectory_id: str
    """Of an imported row, the id of its example."""
    input_ids: list[int]
    mask: list[int]
    is_desirable: bool


@dataclass
class LabelRows(BuiltRows[Label]):
    """Good and bad rows, and the reasons for which everything else was left out."""

    @property
    def trajectory_ids(self) -> list[str]:
        return sorted({row.trajectory_id for row in self.rows})

    @property
    def num_examples(self) -> int:
        """Episodes of the rarer kind; an episode counts once, however many rows it takes."""
        return min(self._count(True), self._count(False))

    def _count(self, is_desirable: bool) -> int:
        return len({row.trajectory_id for row in self.rows if row.is_desirable is is_desirable})

    def details(self) -> dict[str, object]:
        return {"num_good": self._count(True), "num_bad": self._count(False)}


def measure_need(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for good and for bad examples, which need no pair: that of the rarer of the two."""
    learnable, config = logged.learnable, logged.config
    wanted = config.labels
    usable = [each for each in learnable if each.trajectory.may_teach]
    num_good, num_bad = (
        count_capped((each.trajectory for each in usable if each.is_success is outcome), wanted.per_task)
        for outcome in (True, False)
    )
    num_imported = logged.num_imported.get(ExampleKind.LABEL, 0)
    num_good += logged.num_imported_good
    num_bad += num_imported - logged.num_imported_good
    return Need(
        name="labels",
        needed=wanted.min_rows,
        available=min(num_good, num_bad),
        # all of them may be of the rarer kind
        playable=sum(rounds) + config.explore_episodes,
        detail=f"{num_good} rewarded trajectories or imported labels are good examples and {num_bad} are bad ones (of "
        f"one task at most {wanted.per_task} trajectories of each count); the rarer of the two decides",
        mend="give feedback on more answers, on good and on bad ones (with keys, with one that has the scope 'teach'), "
        "or lower labels.min_rows",
    )


def build(material: Material) -> LabelRows:
    """Return the labels of a cycle."""
    built = build_labels(
        material.trajectories,
        material.tokenizer,
        config=material.config.labels,
        max_length_tokens=material.max_length_tokens,
        seed=material.config.seed,
        corrections=material.corrections,
        teaching=material.config.teaching,
        examples=material.examples.get(ExampleKind.LABEL, ()),
    )
    built.counts["not_by_a_teacher"] = material.num_not_by_a_teacher
    return built


def describe(summary: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a report about labels; `summary` as the cycle's row stores it."""
    return [
        f"{summary['num_rows']} labels of {summary['num_tasks']} tasks: {summary['num_good']} good episodes and "
        f"{summary['num_bad']} bad ones ({list_counts(summary['tally'])}).",
        *describe_own_tokens(summary),
    ]


def build_labels(
    graded: Iterable[GradedTrajectory],
    tokenizer: Tokenizer,
    *,
    config: LabelConfig,
    max_length_tokens: int,
    seed: int = 0,
    corrections: Sequence[Correction] = (),
    teaching: TeachingConfig | None = None,
    examples: Sequence[TaughtExample] = (),
) -> LabelRows:
    """Return rows that are good or bad: successes that may be imitated, and failures. A success that somebody corrected
    shows nothing; the better reply itself is a demonstration. Imported examples are added as they are.

    The memory segment is taken out of every row, as it is from preferences, so that what is learned does not depend on
    it. Of one task the newest episodes count, whose policy is nearest to the one that is trained.
    """
    graded = list(graded)
    refuse_held_out(graded)
    built = LabelRows()
    corrected = {each.trajectory.id for each in corrections}
    by_task: dict[tuple[object, ...], list[RolePart]] = defaultdict(list)
    for each in split_roles(graded):
        by_task[*each.task_key, each.is_success].append(each)
    tasks = set()
    for (*task, _, _), episodes in sorted(by_task.items()):
        for each, rows in _take_newest(episodes, corrected, tokenizer, config, max_length_tokens, built):
            built.rows += rows
            built.teachers += [(each.teacher,)] * len(rows)
            tasks.add(tuple(task))
    built.num_tasks = len(tasks)
    _take_examples(examples, tokenizer, max_length_tokens, built)
    # the floor of a teacher: as many good as bad rows as a training needs
    bound_rows(built, config, teaching or TeachingConfig(), seed, floor=2 * config.min_rows)
    return built


def _take_examples(
    examples: Sequence[TaughtExample], tokenizer: Tokenizer, max_length_tokens: int, built: LabelRows
) -> None:
    rendered = render_examples(examples, tokenizer, max_length_tokens, built.counts)
    for each, rows in rendered:
        is_good = bool(each.example.is_good)
        built.rows += [Label(each.example.id, row.input_ids, row.mask, is_good) for row in rows]
        built.teachers += [(each.teacher,)] * len(rows)
    built.num_tasks += len({each.example.task or each.question for each, _ in rendered})


def _take_newest(
    episodes: Sequence[RolePart],
    corrected: set[str],
    tokenizer: Tokenizer,
    config: LabelConfig,
    max_length_tokens: int,
    built: LabelRows,
) -> list[tuple[RolePart, list[Label]]]:
    """Return the rows of the newest episodes of one role in one task that ended alike, without repetitions."""
    taken, seen, counts = [], set(), built.counts
    # ids sort by time
    for each in sorted(episodes, key=lambda each: each.trajectory.id, reverse=True):
        if len(taken) == config.per_task:
            counts["over_task_cap"] += 1
            continue
        try:
            if each.is_success and each.trajectory.id in corrected:
                raise Unstitchable("corrected")
            rows = label_episode(each, tokenizer, max_length_tokens)
        except Unstitchable as reason:
            counts[str(reason)] += 1
            if str(reason) == RERENDER_MISMATCH:
                num_tokens = sum(len(step.output_token_ids or ()) for step in each.model_steps)
                built.own_tokens += num_tokens
                built.untrained[str(reason)] += num_tokens
            continue
        num_tokens = sum(sum(row.mask) for row in rows)
        built.own_tokens += num_tokens
        built.trained_tokens += num_tokens
        tokens = tuple(token for row in rows for token in row.input_ids)
        if tokens in seen:
            counts["duplicate"] += 1
            continue
        seen.add(tokens)
        taken.append((each, rows))
    return taken


def label_episode(each: RolePart, tokenizer: Tokenizer, max_length_tokens: int) -> list[Label]:
    """Return the rows of one role in one episode, without the memory segment.

    Raises:
        Unstitchable: nothing may be learned from it, or it cannot be a row. A row that is too long, or whose prompt
            cannot be rid of the memory segment, leaves out the whole episode: its label is about all of it.
    """
    # a page that makes the agent fail must not choose what is unlearned either
    require_trusted(each)
    if each.is_success:
        require_imitable(each)
    stitched, _ = stitch(each.steps)
    edits = each.plan_memory_removal(tokenizer)
    rows = [remove_memory(row, edits) for row in stitched]
    if any(len(row.input_ids) > max_length_tokens for row in rows):
        raise Unstitchable("too_long")
    return [Label(each.trajectory.id, row.input_ids, row.mask, each.is_success) for row in rows]
