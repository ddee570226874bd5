"""Builds preferences: two replies to the same prompt, of which the tries of a task show that one is better.

Pure functions. Hazard: two tries of a long task differ in many steps that decide nothing, and learning from those makes
a policy worse; the constants below are the evidence that a pair must show.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from memory.datasets.examples import TaughtExample
from memory.formats.content import ExampleKind
from memory.records.feedback import Correction
from optimizer.config import PreferenceConfig, TeachingConfig
from optimizer.data.examples import ExampleRenderer
from optimizer.data.needs import LoggedData, Need
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
from optimizer.data.stitching import (
    Row,
    SegmentEdit,
    Tokenizer,
    Unstitchable,
    remove_memory,
    stitch,
)
from optimizer.insights.contrast import BLAME_DISCOUNT
from optimizer.rewards import GradedTrajectory, refuse_held_out

# Pairs that decide nothing lowered one cycle's success from 86.5 to 78.0 % (docs/log.md, "DPO depended on luck: the
# causes").
LEAST_DIFFERENCE = 0.3
"""Of two replies' survival, for a preference: a loss that followed within three other replies passes."""
MOST_OF_REJECTED = 0.4
"""Survival of a reply that is rejected; one whose loss came much later is near one half."""
LEAST_DIFFERENCE_OF_OUTCOMES = 0.5
"""Of two replies that several tries gave, however late their ends came."""


@dataclass(frozen=True)
class Preference:
    """Two continuations of the same prompt; the loss counts where the masks are 1."""

    chosen_trajectory_id: str
    rejected_trajectory_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    chosen_mask: list[int]
    rejected_ids: list[int]
    rejected_mask: list[int]


@dataclass
class PreferenceRows(BuiltRows[Preference]):
    """Pairs of replies, and the reasons for which everything else was left out."""

    @property
    def trajectory_ids(self) -> list[str]:
        return sorted({id_ for row in self.rows for id_ in (row.chosen_trajectory_id, row.rejected_trajectory_id)})


def measure_need(logged: LoggedData, rounds: Sequence[int]) -> Need:
    """Return the need for pairs of replies. Rounds of practice are not counted: they may bring no contrast."""
    learnable, config = logged.learnable, logged.config
    wanted = config.preferences
    # a pair takes two episodes of one task, a win and a loss
    num_explored = min(config.explore_episodes // 2, config.num_practice_tasks)
    # on the same task: different tasks give no pair
    won, lost = (
        Counter(each.trajectory.task_key for each in learnable if each.is_success is outcome)
        for outcome in (True, False)
    )
    contrasts = won.keys() & lost.keys()
    if config.explore_episodes:
        available, playable = 0, num_explored * wanted.per_task
        detail = "pairs of a win and a loss of the same task come from exploring with the SFT policy"
    else:
        available, playable = sum(min(wanted.per_task, won[task] * lost[task]) for task in contrasts), 0
        detail = f"{len(contrasts)} tasks were won at least once and lost at least once"
    if num_imported := logged.num_imported.get(ExampleKind.PREFERENCE, 0):
        detail += f"; {num_imported} were imported"
    return Need(
        name="preferences",
        needed=wanted.min_rows,
        available=available + num_imported,
        playable=playable,
        detail=detail,
        mend="without them there is no DPO and the SFT policy is the candidate; have the same tasks tried several "
        "times, or raise explore_episodes",
    )


def build(material: Material) -> PreferenceRows:
    """Return the preferences of a cycle."""
    return build_preferences(
        material.trajectories,
        material.tokenizer,
        config=material.config.preferences,
        max_length_tokens=material.max_length_tokens,
        seed=material.config.seed,
        corrections=material.corrections,
        teaching=material.config.teaching,
        examples=material.examples.get(ExampleKind.PREFERENCE, ()),
    )


def describe(summary: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a report about preferences; `summary` as the cycle's row stores it."""
    return [
        f"{summary['num_rows']} preferences of {summary['num_tasks']} tasks ({list_counts(summary['tally'])}).",
        *describe_own_tokens(summary),
    ]


def build_preferences(
    graded: Iterable[GradedTrajectory],
    tokenizer: Tokenizer,
    *,
    config: PreferenceConfig,
    max_length_tokens: int,
    seed: int = 0,
    corrections: Sequence[Correction] = (),
    teaching: TeachingConfig | None = None,
    examples: Sequence[TaughtExample] = (),
) -> PreferenceRows:
    """Return (prompt, chosen, rejected) rows: two replies to the same prompt, of which the tries of the task show that
    one is better, and imported pairs. A success that somebody corrected shows nothing: it may be no success.

    The memory segment is taken out of both sides, so episodes that were shown different things can be compared.
    Departures from ETO (arXiv 2403.02502): the sides need not come from the expert and the agent; what is compared is
    a decision, valued by all tries that came to it as in step-wise preference learning (Agent Q, arXiv 2408.07199),
    not one whole episode with another; a failure that drags on is cut short instead of left out, because it should
    unlearn to go in circles.
    """
    graded = list(graded)
    refuse_held_out(graded)
    built = PreferenceRows()
    corrected = {each.trajectory.id for each in corrections}
    # a corrected failure stays: it is a loss either way
    kept = [each for each in graded if not (each.is_success and each.trajectory.id in corrected)]
    if len(kept) < len(graded):
        built.counts["corrected"] += len(graded) - len(kept)
    # by role too: replies of two roles are never compared
    by_task: dict[tuple[str, ...], list[RolePart]] = defaultdict(list)
    for each in split_roles(kept):
        by_task[each.task_key].append(each)
    tasks = set()
    for (*task, _), tries in sorted(by_task.items()):
        # a task needs both a win and a loss
        if len({each.is_success for each in tries}) == 2:
            found = _weigh_task(tries, tokenizer, config, max_length_tokens, built)
            built.rows += found
            tasks |= {tuple(task)} if found else set()
        else:
            built.counts["no_contrast"] += 1
    built.num_tasks = len(tasks)
    teachers = {each.trajectory.id: each.teacher for each in graded}
    built.teachers = [(teachers[row.chosen_trajectory_id], teachers[row.rejected_trajectory_id]) for row in built.rows]
    _take_examples(examples, tokenizer, max_length_tokens, built)
    bound_rows(built, config, teaching or TeachingConfig(), seed)
    return built


def _take_examples(
    examples: Sequence[TaughtExample], tokenizer: Tokenizer, max_length_tokens: int, built: PreferenceRows
) -> None:
    """Add imported pairs whole: their author compared the whole completions."""
    if not examples:
        return
    renderer = ExampleRenderer(tokenizer, max_length_tokens)
    tasks: set[str] = set()
    for each in examples:
        try:
            chosen, rejected = renderer.render_pair(each)
        except Unstitchable as reason:
            built.counts[str(reason)] += 1
            continue
        start = chosen.starts[0]
        built.rows.append(
            Preference(
                chosen_trajectory_id=each.example.id,
                rejected_trajectory_id=each.example.id,
                prompt_ids=chosen.input_ids[:start],
                chosen_ids=chosen.input_ids[start:],
                chosen_mask=chosen.mask[start:],
                rejected_ids=rejected.input_ids[start:],
                rejected_mask=rejected.mask[start:],
            )
        )
        built.teachers.append((each.teacher,))
        tasks.add(each.example.task or each.question)
    built.num_tasks += len(tasks)


def _weigh_task(
    tries: Sequence[RolePart],
    tokenizer: Tokenizer,
    config: PreferenceConfig,
    max_length_tokens: int,
    built: PreferenceRows,
) -> list[Preference]:
    """Return the preferences of one role in one task, the surest first."""
    sides, counts = [], built.counts
    for each in tries:
        try:
            sides.append(_stitch_side(each, tokenizer, counts))
        except Unstitchable as reason:
            counts[str(reason)] += 1
    found: list[tuple[tuple, Preference]] = []
    nodes = _group_by_prompt(sides, built)
    if all(len(replies) == 1 for replies in nodes.values()):
        counts["prompts_differ"] += 1
    for replies in nodes.values():
        # quadratic in the different replies to one prompt; the tries of a task bound them
        for pair in combinations(replies.values(), 2):
            worse, better = sorted(pair, key=lambda reply: reply.value)
            if not better.wins or not worse.losses:
                continue
            if not _is_evident(better, worse):
                counts["no_evidence"] += 1
                continue
            if better.best is None:
                counts["no_imitable_win"] += 1
                continue
            preference = _weigh(better.best, worse.worst, config)
            length = max(len(preference.chosen_ids), len(preference.rejected_ids))
            # both sides are padded to the longer one
            if len(preference.prompt_ids) + length > max_length_tokens:
                counts["too_long"] += 1
                continue
            ids = (preference.chosen_trajectory_id, preference.rejected_trajectory_id)
            # the ids break ties: a repeated stage must write the same file
            found.append(((worse.survival - better.survival, *ids), preference))
    ranked = [preference for _, preference in sorted(found, key=lambda ranked: ranked[0])]
    counts["over_task_cap"] += max(0, len(ranked) - config.per_task)
    return ranked[: config.per_task]


@dataclass(frozen=True)
class _Side:
    """One role in one try of a task, stitched; the memory segment of a row is removed on first use."""

    graded: RolePart
    rows: list[Row]
    edits: list[SegmentEdit]
    is_imitable: bool
    """Whether it may be a chosen side. A win that may not is evidence all the same, as a loss of its kind is."""
    _bare: dict[int, Row] = field(default_factory=dict, compare=False)

    def bare_row(self, step: int) -> Row:
        """Return the row that holds model step number `step`, without the memory segment."""
        # rows lie in the order of their steps
        number = next(number for number, row in enumerate(self.rows) if step <= row.last_step)
        if number not in self._bare:
            self._bare[number] = remove_memory(self.rows[number], self.edits)
        return self._bare[number]

    def end_of(self, row: Row, step: int) -> int:
        return row.start_of(step) + len(self.graded.model_steps[step].output_token_ids or ())


def _stitch_side(each: RolePart, tokenizer: Tokenizer, counts: Counter[str]) -> _Side:
    require_trusted(each)  # a page that makes the agent fail must not choose what is unlearned either
    rows, joints = stitch(each.steps)
    counts["fork"] += joints["fork"]
    return _Side(each, rows, each.plan_memory_removal(tokenizer), _is_imitable(each))


def _is_imitable(each: RolePart) -> bool:
    try:
        require_imitable(each)
    except Unstitchable:
        return False
    return True


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
    def best(self) -> tuple[_Side, int] | None:
        """Of the wins that may be imitated, the one that needed the fewest steps more; None without any."""
        return min((it for it in self.tries if it[0].is_imitable), key=_order, default=None)

    @property
    def worst(self) -> tuple[_Side, int]:
        """The loss that followed soonest."""
        # raises ValueError without a loss: ask `losses` first
        return min((it for it in self.tries if not it[0].graded.is_success), key=_order)


def _steps_left(side: _Side, step: int) -> int:
    """Return how many other replies of the actor followed; a repeated reply counts once."""
    replies = [tuple(model_step.output_token_ids or ()) for model_step in side.graded.replies_from(step)]
    return len(set(replies)) - 1


def _order(tried: tuple[_Side, int]) -> tuple[int, str]:
    return _steps_left(*tried), tried[0].graded.trajectory.id


def _is_evident(better: _Reply, worse: _Reply) -> bool:
    """Whether the tries show that one reply is better than another, and that luck did not come later.

    Two tries of a long task differ in many steps that decide nothing; learned from, they make the policy worse. Either
    of two kinds of evidence will do: the loss followed soon, or several tries of both ended differently.
    """
    if worse.survival <= MOST_OF_REJECTED and better.survival - worse.survival >= LEAST_DIFFERENCE:
        return better.value > worse.value
    num_tries = len(better.tries), len(worse.tries)
    return min(num_tries) > 1 and better.value - worse.value >= LEAST_DIFFERENCE_OF_OUTCOMES


def _group_by_prompt(sides: Sequence[_Side], built: PreferenceRows) -> dict[tuple[int, ...], dict[tuple, _Reply]]:
    """Return, by prompt without the memory segment, the replies given to it by their tokens."""
    nodes: dict[tuple[int, ...], dict[tuple, _Reply]] = defaultdict(lambda: defaultdict(_Reply))
    for side in sides:
        for step, model_step in enumerate(side.graded.model_steps):
            output = model_step.output_token_ids or ()
            built.own_tokens += len(output)
            try:
                row = side.bare_row(step)
            except Unstitchable as reason:
                built.counts[str(reason)] += 1
                built.untrained[str(reason)] += len(output)
                continue
            built.trained_tokens += len(output)
            # tokens, not text: two texts with equal tokens are one prompt, and only equal tokens train
            prompt = tuple(row.input_ids[: row.start_of(step)])
            nodes[prompt][tuple(output)].tries.append((side, step))
    return nodes


def _weigh(winner: tuple[_Side, int], loser: tuple[_Side, int], config: PreferenceConfig) -> Preference:
    """Return the preference of one reply over another to the same prompt.

    With scope "remainder" a side ends with its row: a later call in another row has another prompt.
    """
    (won_side, won_step), (lost_side, lost_step) = winner, loser
    won, lost = won_side.bare_row(won_step), lost_side.bare_row(lost_step)
    # both rows have the same prompt tokens up to here, which is how they were grouped
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
