"""Turns graded trajectories into rows to learn from: demonstrations to imitate, preferences to weigh. Pure functions.

Refuses to train, to read a database, or to cut a row to a length: one that is too long is left out and counted.
Everything that is left out is counted under a word, so that a report can say where the data went.

Flow: trajectories -> stitched rows -> memory segment out -> filters -> caps -> rows.
Invariant: no held-out task ever enters; token ids are the engine's own.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

from memory.records.feedback import Correction
from optimizer.config import DemonstrationConfig, PreferenceConfig, TeachingConfig
from optimizer.data.corrections import stitch_correction
from optimizer.data.shares import Teachers, choose_rows
from optimizer.data.stitching import Row, SegmentEdit, Unstitchable, plan_memory_removal, remove_memory, stitch
from optimizer.insights.contrast import BLAME_DISCOUNT
from optimizer.rewards import GradedTrajectory, refuse_held_out

LEAST_DIFFERENCE = 0.3
"""Of two replies' survival, for a preference: a loss that followed within three other replies passes."""
MOST_OF_REJECTED = 0.4
"""Survival of a reply that is rejected; one whose loss came much later is near one half."""
LEAST_DIFFERENCE_OF_OUTCOMES = 0.5
"""Of two replies that several tries gave, however late their ends came."""


@dataclass(frozen=True)
class Demonstration:
    """One row to imitate; the loss counts where `mask` is 1."""

    trajectory_id: str
    input_ids: list[int]
    mask: list[int]
    has_memory: bool = False
    is_correction: bool = False


@dataclass(frozen=True)
class Preference:
    """Two ways on from the same prompt; the loss counts where the masks are 1."""

    chosen_trajectory_id: str
    rejected_trajectory_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    chosen_mask: list[int]
    rejected_ids: list[int]
    rejected_mask: list[int]


@dataclass
class DemonstrationRows:
    """What is to be imitated, and what became of everything else."""

    rows: list[Demonstration] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)
    teachers: list[Teachers] = field(default_factory=list)
    """Who is behind each row."""
    num_tasks: int = 0
    num_corrections: int = 0
    """Rows that are not what was played, but what somebody said should have been."""
    tokens_shown: int = 0
    """Prompt tokens of the first calls of the rows as they were played."""
    tokens_kept: int = 0
    """The same after the memory segment went."""
    own_tokens: int = 0
    """Tokens that the agent sampled in all successes that can be imitated and fit the length, before the caps."""
    trained_tokens: int = 0
    """How many of them are in a row with a loss on them."""
    untrained: Counter[str] = field(default_factory=Counter)
    """The others, by the reason their row was left out."""

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.own_tokens if self.own_tokens else 1.0

    @property
    def trajectory_ids(self) -> list[str]:
        return sorted({row.trajectory_id for row in self.rows})

    @property
    def num_examples(self) -> int:
        """Corrections, and episodes that are imitated, however many rows each of them takes."""
        num_corrections = sum(row.is_correction for row in self.rows)
        return num_corrections + len({row.trajectory_id for row in self.rows if not row.is_correction})


@dataclass
class PreferenceRows:
    """What is to be weighed, and what became of everything else."""

    rows: list[Preference] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)
    teachers: list[Teachers] = field(default_factory=list)
    """Who is behind each row."""
    num_tasks: int = 0

    @property
    def trajectory_ids(self) -> list[str]:
        return sorted({id_ for row in self.rows for id_ in (row.chosen_trajectory_id, row.rejected_trajectory_id)})


def build_demonstrations(
    graded: Iterable[GradedTrajectory],
    tokenizer: Any,
    *,
    config: DemonstrationConfig,
    max_length_tokens: int,
    seed: int = 0,
    corrections: Sequence[Correction] = (),
    teaching: TeachingConfig | None = None,
) -> DemonstrationRows:
    """Return the rows to imitate: corrections, and successes that nobody corrected, few per task, the shortest first.
    Mostly without their memory segment. Corrections over the limit of their task are added where the rows would
    otherwise be fewer than a training needs, because nothing is left that they could drown out."""
    graded = list(graded)
    refuse_held_out(graded)
    refuse_held_out(corrections)
    built = DemonstrationRows()
    teaching = teaching or TeachingConfig()
    newest, older = _newest_per_task(corrections, teaching.corrections_per_task)
    with_correction = _take_corrections(newest, tokenizer, config, max_length_tokens, seed, built)
    built.num_corrections = len(built.rows)
    corrected = {each.trajectory.id for each in corrections}
    teachers = {each.trajectory.id: (each.teacher,) for each in graded}
    by_task: dict[tuple[str, ...], list[_Episode]] = defaultdict(list)
    for each in graded:
        try:
            _require_imitable(each)
            if each.trajectory.id in corrected:
                raise Unstitchable("corrected")
            episode = _demonstrate(each, tokenizer, _keeps_memory(each, config, seed), max_length_tokens, built)
        except Unstitchable as reason:
            built.tally[str(reason)] += 1
            continue
        if episode.rows:
            by_task[each.trajectory.task_key].append(episode)
    for _, episodes in sorted(by_task.items()):
        _take_shortest(episodes, config.per_task, built)
    built.teachers += [teachers[row.trajectory_id] for row in built.rows[built.num_corrections :]]
    num_missing = max(0, config.min_rows - built.num_examples)
    with_correction |= _take_corrections(
        older[::-1], tokenizer, config, max_length_tokens, seed, built, most=num_missing
    )
    built.num_tasks += len(with_correction)
    _bound_rows(built, config, teaching, seed)
    built.num_corrections = sum(row.is_correction for row in built.rows)
    return built


@dataclass(frozen=True)
class _Episode:
    """The rows of one success, and the length of their prompts as played and as kept."""

    trajectory_id: str
    rows: list[Demonstration]
    tokens_shown: int
    tokens_kept: int

    @property
    def output(self) -> tuple[int, ...]:
        """Everything the agent said that is trained."""
        return tuple(token for row in self.rows for token, own in zip(row.input_ids, row.mask, strict=True) if own)


def _take_corrections(
    corrections: Sequence[Correction],
    tokenizer: Any,
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
        if len(built.rows) == end:
            built.tally["over_correction_cap"] += len(corrections) - number
            break
        has_memory = bool(each.trajectory.memory_text) and _keeps_memory(each, config, seed)
        try:
            _require_trusted(each)
            row = stitch_correction(each, tokenizer)
            kept = row if has_memory else remove_memory(row, plan_memory_removal(each.trajectory, tokenizer))
            if len(kept.input_ids) > max_length_tokens:
                raise Unstitchable("too_long")
        except Unstitchable as reason:
            built.tally[str(reason)] += 1
            continue
        built.rows.append(Demonstration(each.trajectory.id, kept.input_ids, kept.mask, has_memory, True))
        built.teachers.append((each.teacher,))
        built.tokens_shown += row.num_prompt_tokens
        built.tokens_kept += kept.num_prompt_tokens
        tasks.add(each.trajectory.task_key)
    return tasks


def _newest_per_task(corrections: Sequence[Correction], most: int) -> tuple[list[Correction], list[Correction]]:
    """Return the newest `most` corrections of each task, and the others; both oldest first."""
    num_left: Counter[tuple[str, ...]] = Counter(each.trajectory.task_key for each in corrections)
    newest, older = [], []
    for each in corrections:
        (newest if num_left[each.trajectory.task_key] <= most else older).append(each)
        num_left[each.trajectory.task_key] -= 1
    return newest, older


def _require_trusted(each: GradedTrajectory | Correction) -> None:
    if not each.trajectory.may_teach:
        raise Unstitchable("untrusted")


def _require_imitable(each: GradedTrajectory) -> None:
    if not each.is_success:
        raise Unstitchable("not_a_success")
    _require_trusted(each)
    if each.trajectory.num_invalid_tool_calls > 0:
        raise Unstitchable("invalid_tool_calls")
    if any(step.finish_reason == "length" for step in each.model_steps):
        raise Unstitchable("cut_output")


def _keeps_memory(each: GradedTrajectory | Correction, config: DemonstrationConfig, seed: int) -> bool:
    # by the trajectory's own id, so that a repeated stage builds the same rows
    return random.Random(f"{seed}:{each.trajectory.id}").random() < config.keep_memory_share


def _demonstrate(
    each: GradedTrajectory, tokenizer: Any, keeps_memory: bool, max_length_tokens: int, built: DemonstrationRows
) -> _Episode:
    """Return the rows of one success. A row whose prompt cannot be rid of the memory segment is left out alone, since
    the other calls stand in contexts of their own; a row that is too long leaves out the whole episode."""
    trajectory = each.trajectory
    stitched, joints = stitch(each.steps)
    has_memory = bool(trajectory.memory_text) and keeps_memory
    edits = [] if has_memory else plan_memory_removal(trajectory, tokenizer)
    rows, untrained = [], Counter[str]()
    tokens_shown = tokens_kept = 0
    for row in stitched:
        try:
            kept = remove_memory(row, edits)
        except Unstitchable as reason:
            untrained[str(reason)] += sum(row.mask)
            built.tally[str(reason)] += 1
            continue
        if len(kept.input_ids) > max_length_tokens:
            raise Unstitchable("too_long")
        rows.append(Demonstration(trajectory.id, kept.input_ids, kept.mask, has_memory))
        tokens_shown += row.num_prompt_tokens
        tokens_kept += kept.num_prompt_tokens
    built.tally.update(joints)
    built.own_tokens += sum(len(step.output_token_ids or ()) for step in each.model_steps)
    built.trained_tokens += sum(sum(row.mask) for row in rows)
    built.untrained.update(untrained)
    return _Episode(trajectory.id, rows, tokens_shown, tokens_kept)


def _take_shortest(episodes: Sequence[_Episode], per_task: int, built: DemonstrationRows) -> None:
    outputs: set[tuple[int, ...]] = set()
    for episode in sorted(episodes, key=lambda episode: (len(episode.output), episode.trajectory_id)):
        if episode.output in outputs:
            built.tally["duplicate"] += 1
        elif len(outputs) >= per_task:
            built.tally["over_task_cap"] += 1
        else:
            outputs.add(episode.output)
            built.rows += episode.rows
            built.tokens_shown += episode.tokens_shown
            built.tokens_kept += episode.tokens_kept
    built.num_tasks += bool(outputs)


def build_preferences(
    graded: Iterable[GradedTrajectory],
    tokenizer: Any,
    *,
    config: PreferenceConfig,
    max_length_tokens: int,
    seed: int = 0,
    corrections: Sequence[Correction] = (),
    teaching: TeachingConfig | None = None,
) -> PreferenceRows:
    """Return (prompt, chosen, rejected) rows: two replies to the same prompt, of which the tries of the task show that
    one is better. A success that somebody corrected shows nothing: it may be no success.

    The memory segment is taken out of both sides, so episodes that were shown different things can be compared.
    Departures from ETO (arXiv 2403.02502): the sides need not come from the expert and the agent; what is compared is
    a decision, valued by all tries that came to it as in step-wise preference learning (Agent Q, arXiv 2408.07199), not
    one whole episode with another; a failure that drags on is cut short instead of left out, because going in circles
    is what it should unlearn.
    """
    graded = list(graded)
    refuse_held_out(graded)
    built = PreferenceRows()
    corrected = {each.trajectory.id for each in corrections}
    kept = [each for each in graded if not (each.is_success and each.trajectory.id in corrected)]
    if len(kept) < len(graded):
        built.tally["corrected"] += len(graded) - len(kept)
    by_task: dict[tuple[str, ...], list[GradedTrajectory]] = defaultdict(list)
    for each in kept:
        by_task[each.trajectory.task_key].append(each)
    for _, tries in sorted(by_task.items()):
        if len({each.is_success for each in tries}) == 2:
            found = _weigh_task(tries, tokenizer, config, max_length_tokens, built.tally)
            built.rows += found
            built.num_tasks += bool(found)
        else:
            built.tally["no_contrast"] += 1
    teachers = {each.trajectory.id: each.teacher for each in graded}
    built.teachers = [(teachers[row.chosen_trajectory_id], teachers[row.rejected_trajectory_id]) for row in built.rows]
    _bound_rows(built, config, teaching or TeachingConfig(), seed)
    return built


def _weigh_task(
    tries: Sequence[GradedTrajectory],
    tokenizer: Any,
    config: PreferenceConfig,
    max_length_tokens: int,
    tally: Counter[str],
) -> list[Preference]:
    """Return the preferences of one task, the surest first."""
    sides = []
    for each in tries:
        try:
            sides.append(_stitch_side(each, tokenizer, tally))
        except Unstitchable as reason:
            tally[str(reason)] += 1
    found: list[tuple[tuple, Preference]] = []
    nodes = _group_by_prompt(sides, tally)
    if all(len(replies) == 1 for replies in nodes.values()):
        tally["prompts_differ"] += 1
    for replies in nodes.values():
        for better, worse in permutations(replies.values(), 2):
            if not better.wins or not worse.losses:
                continue
            if not _is_evident(better, worse):
                tally["no_evidence"] += 1
                continue
            preference = _weigh(better.best, worse.worst, config)
            length = max(len(preference.chosen_ids), len(preference.rejected_ids))
            if len(preference.prompt_ids) + length > max_length_tokens:
                tally["too_long"] += 1
                continue
            ids = (preference.chosen_trajectory_id, preference.rejected_trajectory_id)
            found.append(((worse.survival - better.survival, *ids), preference))
    ranked = [preference for _, preference in sorted(found, key=lambda ranked: ranked[0])]
    tally["over_task_cap"] += max(0, len(ranked) - config.per_task)
    return ranked[: config.per_task]


@dataclass(frozen=True)
class _Side:
    """One try of a task, stitched; each row is rid of its memory segment when it is asked for."""

    graded: GradedTrajectory
    rows: list[Row]
    edits: list[SegmentEdit]
    _bare: dict[int, Row] = field(default_factory=dict, compare=False)

    def bare_row(self, step: int) -> Row:
        """Return the row that holds model step number `step`, without the memory segment."""
        number = next(number for number, row in enumerate(self.rows) if step <= row.last_step)
        if number not in self._bare:
            self._bare[number] = remove_memory(self.rows[number], self.edits)
        return self._bare[number]

    def end_of(self, row: Row, step: int) -> int:
        return row.start_of(step) + len(self.graded.model_steps[step].output_token_ids or ())


def _stitch_side(each: GradedTrajectory, tokenizer: Any, tally: Counter[str]) -> _Side:
    _require_trusted(each)  # a page that makes the agent fail must not choose what is unlearned either
    if each.is_success:
        _require_imitable(each)
    rows, joints = stitch(each.steps)
    tally["fork"] += joints["fork"]
    return _Side(each, rows, plan_memory_removal(each.trajectory, tokenizer))


@dataclass
class _Reply:
    """One reply to one prompt, and every try of the task that gave it there."""

    tries: list[tuple[_Side, int]] = field(default_factory=list)
    """Each with the number of the model step."""

    @property
    def wins(self) -> int:
        return sum(side.graded.is_success for side, _ in self.tries)

    @property
    def losses(self) -> int:
        return len(self.tries) - self.wins

    @property
    def value(self) -> float:
        """How the tries ended, with one more try half won."""
        return (self.wins + 0.5) / (len(self.tries) + 1)

    @property
    def survival(self) -> float:
        """The same, where a loss counts less the later it followed."""
        blame = sum(
            BLAME_DISCOUNT ** _steps_left(side, step) for side, step in self.tries if not side.graded.is_success
        )
        return (self.wins + 0.5) / (self.wins + blame + 1)

    @property
    def best(self) -> tuple[_Side, int]:
        """The win that needed the fewest steps more."""
        return min((it for it in self.tries if it[0].graded.is_success), key=_order)

    @property
    def worst(self) -> tuple[_Side, int]:
        """The loss that followed soonest."""
        return min((it for it in self.tries if not it[0].graded.is_success), key=_order)


def _steps_left(side: _Side, step: int) -> int:
    """Return how many other replies followed; a circle is a single one, however often it is gone round."""
    replies = [tuple(model_step.output_token_ids or ()) for model_step in side.graded.model_steps[step:]]
    return len(set(replies)) - 1


def _order(tried: tuple[_Side, int]) -> tuple[int, str]:
    return _steps_left(*tried), tried[0].graded.trajectory.id


def _is_evident(better: _Reply, worse: _Reply) -> bool:
    """Whether the tries say that one reply is better than another, and not that luck came later.

    Two tries of a long task differ in many steps that decide nothing; learned from, they make the policy worse. Either
    of two testimonies will do: the loss followed soon, or several tries of both ended differently.
    """
    if worse.survival <= MOST_OF_REJECTED and better.survival - worse.survival >= LEAST_DIFFERENCE:
        return better.value > worse.value
    num_tries = len(better.tries), len(worse.tries)
    return min(num_tries) > 1 and better.value - worse.value >= LEAST_DIFFERENCE_OF_OUTCOMES


def _group_by_prompt(sides: Sequence[_Side], tally: Counter[str]) -> dict[tuple[int, ...], dict[tuple, _Reply]]:
    """Return, by prompt without the memory segment, the replies given to it by their tokens."""
    nodes: dict[tuple[int, ...], dict[tuple, _Reply]] = defaultdict(lambda: defaultdict(_Reply))
    for side in sides:
        for step, model_step in enumerate(side.graded.model_steps):
            try:
                row = side.bare_row(step)
            except Unstitchable as reason:
                tally[str(reason)] += 1
                continue
            prompt = tuple(row.input_ids[: row.start_of(step)])
            nodes[prompt][tuple(model_step.output_token_ids or ())].tries.append((side, step))
    return nodes


def _weigh(winner: tuple[_Side, int], loser: tuple[_Side, int], config: PreferenceConfig) -> Preference:
    """Return the preference of one reply over another to the same prompt.

    With scope "remainder" a side ends with its row: what a later call of another row said stands behind another prompt.
    """
    (won_side, won_step), (lost_side, lost_step) = winner, loser
    won, lost = won_side.bare_row(won_step), lost_side.bare_row(lost_step)
    start = won.start_of(won_step)
    last_chosen, last_rejected = won_step, lost_step
    if config.scope == "remainder":
        last_chosen = won.last_step
        last_rejected = min(lost.last_step, lost_step + (last_chosen - won_step) + config.max_extra_rounds)
    chosen_end, rejected_end = won_side.end_of(won, last_chosen), lost_side.end_of(lost, last_rejected)
    return Preference(
        chosen_trajectory_id=won_side.graded.trajectory.id,
        rejected_trajectory_id=lost_side.graded.trajectory.id,
        prompt_ids=won.input_ids[:start],
        chosen_ids=won.input_ids[start:chosen_end],
        chosen_mask=won.mask[start:chosen_end],
        rejected_ids=lost.input_ids[start:rejected_end],
        rejected_mask=lost.mask[start:rejected_end],
    )


def _bound_rows(
    built: DemonstrationRows | PreferenceRows,
    config: DemonstrationConfig | PreferenceConfig,
    teaching: TeachingConfig,
    seed: int,
) -> None:
    """Leave out what is over a teacher's bounds, then what is over the total."""
    kept = choose_rows(built.teachers, teaching, floor=config.min_rows, seed=seed, tally=built.tally)
    if len(kept) > config.max_rows:
        built.tally["over_total_cap"] += len(kept) - config.max_rows
        kept = sorted(random.Random(seed).sample(kept, config.max_rows))
    built.rows = [built.rows[position] for position in kept]
    built.teachers = [built.teachers[position] for position in kept]
    built.tally["used"] = len(built.rows)


def write_rows(rows: Sequence[Demonstration | Preference], path: Path) -> None:
    """Write one JSON object per line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(asdict(row), separators=(",", ":")) + "\n")
    unfinished.replace(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def count_tokens(row: dict[str, Any]) -> int:
    """Return the length of a row that `read_rows` read; of a preference, with its longer side."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
