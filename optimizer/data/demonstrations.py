"""Builds demonstrations: rows of tokens to imitate, from successes, corrections and imports. Pure functions."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memory.datasets.examples import TaughtExample
from memory.formats.content import ExampleKind
from memory.records.feedback import Correction
from memory.statistics import wilson_interval
from optimizer.config import DemonstrationConfig, TeachingConfig
from optimizer.data.corrections import stitch_correction
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
from optimizer.data.stitching import Tokenizer, Unstitchable, plan_memory_removal, remove_memory, stitch
from optimizer.rewards import GradedTrajectory, refuse_held_out


@dataclass(frozen=True)
class Demonstration:
    """One row to imitate; the loss counts where `mask` is 1."""

    trajectory_id: str
    input_ids: list[int]
    mask: list[int]
    has_memory: bool = False
    is_correction: bool = False
    is_imported: bool = False
    """Then `trajectory_id` is the id of an example."""


@dataclass
class DemonstrationRows(BuiltRows[Demonstration]):
    """Rows to imitate, and the reasons for which everything else was left out."""

    num_corrections: int = 0
    """Rows whose reply was not played, but written by a person as the better one."""
    tokens_shown: int = 0
    """Prompt tokens of the first calls of the rows as they were played."""
    tokens_kept: int = 0
    """The same without the memory segment."""

    @property
    def trajectory_ids(self) -> list[str]:
        return sorted({row.trajectory_id for row in self.rows})

    @property
    def num_examples(self) -> int:
        """Corrections and imitated episodes; an episode counts once, however many rows it takes."""
        num_corrections = sum(row.is_correction for row in self.rows)
        return num_corrections + len({row.trajectory_id for row in self.rows if not row.is_correction})

    def details(self) -> dict[str, object]:
        return {
            "num_examples": self.num_examples,
            "num_corrections": self.num_corrections,
            "num_imported": len({row.trajectory_id for row in self.rows if row.is_imported}),
            "num_with_memory": sum(row.has_memory for row in self.rows),
            "tokens_shown": self.tokens_shown,
            "tokens_kept": self.tokens_kept,
        }


def measure_need(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for rows to imitate, with `rounds` of practice still to be played."""
    learnable, corrections, config = logged.learnable, logged.corrections, logged.config
    corrected = {each.trajectory.id for each in corrections}
    successes = [each.trajectory for each in learnable if each.is_success]
    # must leave in all that data/demonstrations.py may take: counted too low, a cycle that could train is rejected.
    # Length and template are not known yet
    imitable = [it for it in successes if it.may_teach and not it.num_invalid_tool_calls and it.id not in corrected]
    taught = [each.trajectory for each in corrections if each.trajectory.may_teach]
    per_task, corrections_per_task = config.demonstrations.per_task, config.teaching.corrections_per_task
    num_corrections = count_capped(taught, corrections_per_task)
    available = count_capped(imitable, per_task) + num_corrections
    # more corrections of one task are taken where rows would lack otherwise
    num_lacking = max(0, config.demonstrations.min_rows - available)
    available += min(len(taught) - num_corrections, num_lacking)
    num_imported = logged.num_imported.get(ExampleKind.DEMONSTRATION, 0)
    available += num_imported
    playable, record = _count_playable(logged, rounds)
    play = "play more practice_episodes" if config.environment else "name an environment to practise in"
    return Need(
        name="demonstrations",
        needed=config.demonstrations.min_rows,
        available=available,
        playable=playable,
        detail=f"{len(successes)} of {len(learnable)} rewarded trajectories are successes, {len(corrections)} replies "
        f"were corrected and {num_imported} demonstrations imported, which makes {available} demonstrations (of one "
        f"task at most {per_task} successes count)"
        f"{record}",
        mend=f"{play}, give feedback (with keys, with one that has the scope 'teach') or corrections, import "
        "demonstrations for it, or lower demonstrations.min_rows",
    )


def _count_playable(logged: LoggedData, rounds: Sequence[int]) -> tuple[int, str]:
    """Return how many demonstrations these rounds of practice bring at the most, and the basis of that estimate.

    A policy that never won gets no lessons from its failures, so its next episodes will not do better than the upper
    end of what it showed. One that won may learn from one round to the next: it is bounded by the caps alone.
    """
    config, active = logged.config, logged.active
    # a round plays each of its tasks once: the longest per_task rounds together give each task its most successes
    most = sum(sorted(rounds, reverse=True)[: config.demonstrations.per_task])
    tries = [
        each
        for each in logged.learnable
        if each.trajectory.environment == config.environment and each.trajectory.policy == active
    ]
    num_won = sum(each.is_success for each in tries)
    if not tries or num_won:
        return most, ""
    likely = math.ceil(wilson_interval(0, len(tries))[1] * sum(rounds))
    # the upper end of the interval, not the mean: a cycle is rejected only if it cannot work
    return min(most, likely), f"; v{active} won none of {len(tries)} episodes of {config.environment!r}"


def build(material: Material) -> DemonstrationRows:
    """Return the demonstrations of a cycle."""
    built = build_demonstrations(
        material.trajectories,
        material.tokenizer,
        config=material.config.demonstrations,
        max_length_tokens=material.max_length_tokens,
        seed=material.config.seed,
        corrections=material.corrections,
        teaching=material.config.teaching,
        examples=material.examples.get(ExampleKind.DEMONSTRATION, ()),
    )
    built.counts["not_by_a_teacher"] = material.num_not_by_a_teacher
    return built


def describe(summary: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a report about demonstrations; `summary` as the cycle's row stores it."""
    paragraphs = [
        f"{summary['num_rows']} demonstrations of {summary['num_tasks']} tasks, {summary['num_with_memory']} of them "
        f"with their memory segment ({list_counts(summary['tally'])})."
    ]
    if summary.get("num_imported"):
        paragraphs.append(f"{summary['num_imported']} demonstrations were imported.")
    sentences = describe_own_tokens(summary)
    if num_forks := summary["tally"].get("fork"):
        sentences.append(
            f"{num_forks} model calls began a row of their own, because the chat template wrote an earlier reply "
            "differently than it was sampled."
        )
    return paragraphs + ([" ".join(sentences)] if sentences else [])


def build_demonstrations(
    graded: Iterable[GradedTrajectory],
    tokenizer: Tokenizer,
    *,
    config: DemonstrationConfig,
    max_length_tokens: int,
    seed: int = 0,
    corrections: Sequence[Correction] = (),
    teaching: TeachingConfig | None = None,
    examples: Sequence[TaughtExample] = (),
) -> DemonstrationRows:
    """Return the rows to imitate: corrections, successes that nobody corrected, few per task and role, the shortest
    first, and imported examples. Mostly without their memory segment. Corrections over the limit of their task are
    added where the rows would otherwise be fewer than a training needs, because nothing is left that they could drown
    out."""
    graded = list(graded)
    refuse_held_out(graded)
    refuse_held_out(corrections)
    built = DemonstrationRows()
    teaching = teaching or TeachingConfig()
    # corrections first: they take precedence over the episode they correct
    newest, older = _newest_per_task(corrections, teaching.corrections_per_task)
    with_correction = _take_corrections(newest, tokenizer, config, max_length_tokens, seed, built)
    built.num_corrections = len(built.rows)
    # a corrected success must not be imitated: a person has said that it is none
    corrected = {each.trajectory.id for each in corrections}
    teachers = {each.trajectory.id: (each.teacher,) for each in graded}
    by_task: dict[tuple[str, ...], list[_Episode]] = defaultdict(list)
    for each in split_roles(graded):
        try:
            require_imitable(each)
            if each.trajectory.id in corrected:
                raise Unstitchable("corrected")
            episode = _demonstrate(each, tokenizer, _keeps_memory(each, config, seed), max_length_tokens, built)
        except Unstitchable as reason:
            built.counts[str(reason)] += 1
            continue
        if episode.rows:
            by_task[each.task_key].append(episode)
    for _, episodes in sorted(by_task.items()):
        _take_shortest(episodes, config.per_task, built)
    built.num_tasks = len({tuple(task) for *task, _ in by_task})
    # parallel to `rows`: bound_rows picks from both by position
    built.teachers += [teachers[row.trajectory_id] for row in built.rows[built.num_corrections :]]
    _take_examples(examples, tokenizer, max_length_tokens, built)
    # older corrections only fill up to the minimum
    num_missing = max(0, config.min_rows - built.num_examples)
    with_correction |= _take_corrections(
        older[::-1], tokenizer, config, max_length_tokens, seed, built, most=num_missing
    )
    built.num_tasks += len(with_correction)
    # last: the limits of teachers hold for everything that was taken, fillers included
    bound_rows(built, config, teaching, seed)
    built.num_corrections = sum(row.is_correction for row in built.rows)
    return built


@dataclass(frozen=True)
class _Episode:
    """The rows of one success of a role; the length of their prompts before and after the memory segment is removed."""

    trajectory_id: str
    rows: list[Demonstration]
    tokens_shown: int
    tokens_kept: int

    @property
    def output(self) -> tuple[int, ...]:
        """All tokens of the agent that are trained."""
        return tuple(token for row in self.rows for token, own in zip(row.input_ids, row.mask, strict=True) if own)


def _take_corrections(
    corrections: Sequence[Correction],
    tokenizer: Tokenizer,
    config: DemonstrationConfig,
    max_length_tokens: int,
    seed: int,
    built: DemonstrationRows,
    *,
    most: int | None = None,
) -> set[tuple[str, ...]]:
    """Add a row for each correction that can be one, `most` of them at the most; return the keys of their tasks."""
    tasks = set()
    end = None if most is None else len(built.rows) + most
    for number, each in enumerate(corrections):
        # rows are counted, not tries: a correction that cannot be rendered does not use up the number
        if len(built.rows) == end:
            built.counts["over_correction_cap"] += len(corrections) - number
            break
        has_memory = bool(each.trajectory.memory_text) and _keeps_memory(each, config, seed)
        try:
            require_trusted(each)
            row = stitch_correction(each, tokenizer)
            kept = row if has_memory else remove_memory(row, plan_memory_removal(each.trajectory, tokenizer))
            if len(kept.input_ids) > max_length_tokens:
                raise Unstitchable("too_long")
        except Unstitchable as reason:
            built.counts[str(reason)] += 1
            continue
        built.rows.append(Demonstration(each.trajectory.id, kept.input_ids, kept.mask, has_memory, True))
        built.teachers.append((each.teacher,))
        built.tokens_shown += row.num_prompt_tokens
        built.tokens_kept += kept.num_prompt_tokens
        tasks.add(each.trajectory.task_key)
    return tasks


def _take_examples(
    examples: Sequence[TaughtExample], tokenizer: Tokenizer, max_length_tokens: int, built: DemonstrationRows
) -> None:
    """Add the rows of imported examples. They have no limit per task: somebody chose each of them."""
    rendered = render_examples(examples, tokenizer, max_length_tokens, built.counts)
    for each, rows in rendered:
        built.rows += [Demonstration(each.example.id, row.input_ids, row.mask, is_imported=True) for row in rows]
        built.teachers += [(each.teacher,)] * len(rows)
    built.num_tasks += len({each.example.task or each.question for each, _ in rendered})


def _newest_per_task(corrections: Sequence[Correction], most: int) -> tuple[list[Correction], list[Correction]]:
    """Return the newest `most` corrections of each task, and the others; both oldest first."""
    num_left: Counter[tuple[str, ...]] = Counter(each.trajectory.task_key for each in corrections)
    newest, older = [], []
    for each in corrections:
        (newest if num_left[each.trajectory.task_key] <= most else older).append(each)
        num_left[each.trajectory.task_key] -= 1
    return newest, older


def _keeps_memory(each: GradedTrajectory | Correction, config: DemonstrationConfig, seed: int) -> bool:
    # by the trajectory's own id, so that a repeated stage builds the same rows
    return random.Random(f"{seed}:{each.trajectory.id}").random() < config.keep_memory_share


def _demonstrate(
    each: RolePart, tokenizer: Tokenizer, keeps_memory: bool, max_length_tokens: int, built: DemonstrationRows
) -> _Episode:
    """Return the rows of one success of a role. A row whose prompt cannot be rid of the memory segment is left out
    alone, because the other calls have contexts of their own; a row that is too long leaves out all of them."""
    trajectory = each.trajectory
    stitched, joints = stitch(each.steps)
    has_memory = each.has_memory and keeps_memory
    edits = [] if has_memory else each.plan_memory_removal(tokenizer)
    rows, untrained = [], Counter[str]()
    tokens_shown = tokens_kept = 0
    for row in stitched:
        try:
            kept = remove_memory(row, edits)
        except Unstitchable as reason:
            untrained[str(reason)] += sum(row.mask)
            built.counts[str(reason)] += 1
            continue
        if len(kept.input_ids) > max_length_tokens:
            raise Unstitchable("too_long")
        rows.append(Demonstration(trajectory.id, kept.input_ids, kept.mask, has_memory))
        tokens_shown += row.num_prompt_tokens
        tokens_kept += kept.num_prompt_tokens
    built.counts.update(joints)
    # after the loop: an episode that is too long says nothing about the template
    built.own_tokens += sum(len(step.output_token_ids or ()) for step in each.model_steps)
    # counted before the caps, so that the share measures the template and not the caps
    built.trained_tokens += sum(sum(row.mask) for row in rows)
    built.untrained.update(untrained)
    return _Episode(trajectory.id, rows, tokens_shown, tokens_kept)


def _take_shortest(episodes: Sequence[_Episode], per_task: int, built: DemonstrationRows) -> None:
    # the shortest successes contain hasty habits more often (docs/log.md): preferences correct that
    outputs: set[tuple[int, ...]] = set()
    # ties by id: a repeated stage must write the same file, or the digest of its training changes
    for episode in sorted(episodes, key=lambda episode: (len(episode.output), episode.trajectory_id)):
        if episode.output in outputs:
            built.counts["duplicate"] += 1
        elif len(outputs) >= per_task:
            built.counts["over_task_cap"] += 1
        else:
            # two episodes with equal output teach the same; their prompts may differ in memory
            outputs.add(episode.output)
            built.rows += episode.rows
            built.tokens_shown += episode.tokens_shown
            built.tokens_kept += episode.tokens_kept
