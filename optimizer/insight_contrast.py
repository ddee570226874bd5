"""Finds lessons by counting, where no model writes prose: which action, for which instruction, goes with success.

Refuses to know any environment: it sees lines of text, actions, and how episodes ended. "fry the carrot" was read,
"cook carrot with stove" was done: the words they share are the entity, what is left is a cue and an action, "fry the _"
and "cook _ with stove". Over many episodes and entities the cue is met by competing actions, and one of them survives.

Flow: trajectory -> occurrences (cue, action, entity, credit) -> tally per cue -> exact test -> best action per cue.

Why two testimonies. Some worlds punish at once, others late, and an episode that did one thing right may be lost by
another. So each action is tried by two counts, and either will do, at the price of testing twice. By outcome: episodes
won and not won. By survival: blame for a lost episode falls with the distance to its end, by `BLAME_DISCOUNT` a step,
as a discounted return does; the action that the end follows at once bears the loss in full, one three steps earlier an
eighth, and what it does not bear it survived. No model of the environment is needed. An action that never was part of a
success is no lesson, however well it survives.

Why minimal contrasts. Many actions share a word with an instruction: the carrot is also taken, and sliced. Only actions
that differ in one span of words ("cook _ with stove", "cook _ with oven") are rival answers to the same cue; the rest
are other parts of the plan. A cue that was met by one action only carries no contrast, and no lesson.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from scipy.stats import false_discovery_control, fisher_exact

from memory.exemplars import render_call
from memory.insights import InsightOperation, OperationKind, SupportCounts
from memory.schema import Insight, StepKind
from optimizer.rewards import GradedTrajectory

BLANK = "_"
ARROW = " -> "
BLAME_DISCOUNT = 0.5
SIGNIFICANCE = 0.05
MAX_LINE_WORDS = 12  # an instruction is short; longer lines tell a story
MIN_TRIES = 3  # on either side; fewer cannot be significant, and only dilute the many tests
MIN_ENTITIES = 2  # a blank that one thing always fills is no blank
MAX_SPAN_WORDS = 3  # of what may differ between two rival actions
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
LINE_BREAK = re.compile(r"\n|(?<=[.!?:;])\s+")
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be by can do does for from has have here i if in into is it its me my of off on onto or
        out over some that the their them then there these they this to up was we were what which will with you your""",
    )
)

Words = tuple[str, ...]


@dataclass(frozen=True)
class Occurrence:
    """One action answering one cue, filled with one entity."""

    cue: Words
    action: Words
    entity: Words


@dataclass
class Tally:
    """What became of the episodes that answered a cue with an action."""

    wins: int = 0
    """Episodes won."""
    losses: float = 0.0
    """Blame for episodes lost, at most 1 each."""
    num_tries: int = 0
    entities: set[Words] = field(default_factory=set)
    """What filled the blank."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.wins + other.wins,
            self.losses + other.losses,
            self.num_tries + other.num_tries,
            self.entities | other.entities,
        )

    @property
    def by_outcome(self) -> tuple[int, int]:
        return self.wins, self.num_tries - self.wins

    @property
    def by_survival(self) -> tuple[int, int]:
        losses = round(self.losses)
        return self.num_tries - losses, losses


@dataclass(frozen=True)
class Contrast:
    """A cue, the action that answers it, and how it did against its rivals."""

    cue: Words
    action: Words
    tally: Tally
    otherwise: Tally
    p_value: float

    @property
    def text(self) -> str:
        return f"{' '.join(self.cue)}{ARROW}{' '.join(self.action)}"

    @property
    def support(self) -> SupportCounts:
        return SupportCounts(
            self.tally.wins, round(self.tally.losses), self.otherwise.wins, round(self.otherwise.losses)
        )


def contrast_insights(
    graded: Iterable[GradedTrajectory], *, known: Sequence[Insight], significance: float = SIGNIFICANCE
) -> list[InsightOperation]:
    """Return what the tallies say: ADD or AGREE for the best action of each cue, REMOVE for what they speak against."""
    by_place: dict[tuple[str, str], list[GradedTrajectory]] = defaultdict(list)
    for each in graded:
        if each.trajectory.environment is not None:
            by_place[(each.trajectory.environment, each.trajectory.kind)].append(each)
    operations: list[InsightOperation] = []
    for (environment, kind), episodes in sorted(by_place.items()):
        tallies = tally_occurrences(episodes)
        believed = {insight.text for insight in known if (insight.environment, insight.kind) == (environment, kind)}
        best = find_best_actions(tallies, significance=significance)
        for contrast in best:
            verb = OperationKind.AGREE if contrast.text in believed else OperationKind.ADD
            operations.append(InsightOperation(verb, environment, kind, contrast.text, counts=contrast.support))
        refuted = find_refuted(tallies, believed - {contrast.text for contrast in best})
        operations += [
            InsightOperation(OperationKind.REMOVE, environment, kind, contrast.text, counts=contrast.support)
            for contrast in refuted
        ]
    return operations


def tally_occurrences(episodes: Iterable[GradedTrajectory]) -> dict[Words, dict[Words, Tally]]:
    """Count, per cue and action, the episodes they were seen in: each (cue, action, entity) once an episode."""
    tallies: dict[Words, dict[Words, Tally]] = defaultdict(lambda: defaultdict(Tally))
    for each in episodes:
        blame: dict[Occurrence, float] = defaultdict(float)
        for occurrence, num_actions_after in find_occurrences(each):
            blame[occurrence] = max(blame[occurrence], BLAME_DISCOUNT**num_actions_after)
        for occurrence, share in blame.items():
            tally = tallies[occurrence.cue][occurrence.action]
            tally.num_tries += 1
            tally.entities.add(occurrence.entity)
            if each.is_success:
                tally.wins += 1
            else:
                tally.losses += share
    return tallies


def find_occurrences(each: GradedTrajectory) -> Iterator[tuple[Occurrence, int]]:
    """Yield every answer to a cue in one episode, with the number of actions that came after it.

    Lines come from the task text and from tool results before the action; never from the memory segment, whose words
    must not be extracted again.
    """
    lines = dict.fromkeys(read_lines(each.trajectory.task_text))
    answers: list[tuple[int, Occurrence]] = []
    num_actions = 0
    for step in each.steps:
        if step.kind is StepKind.TOOL:
            lines.update(dict.fromkeys(read_lines(step.content)))
            continue
        for call in step.tool_calls:
            action = read_words(render_call(call))
            answers += [(num_actions, occurrence) for line in lines for occurrence in align(line, action)]
            num_actions += 1
    for position, occurrence in answers:
        yield occurrence, num_actions - 1 - position


def read_lines(text: str) -> list[Words]:
    """Return the short lines and sentences of a text, as words."""
    lines = (read_words(line) for line in LINE_BREAK.split(text))
    return [words for words in lines if 1 < len(words) <= MAX_LINE_WORDS]


def read_words(text: str) -> Words:
    return tuple(WORD.findall(text.lower()))


def align(line: Words, action: Words) -> list[Occurrence]:
    """Return how `action` answers `line`: the longest run of words they share becomes the blank in both.

    When several runs are longest, each is tried: "slice the carrot" shares "slice" and "carrot" with "slice carrot with
    knife", and only the counts can tell which of the two is the entity.
    """
    if not (set(line) & set(action)) - STOP_WORDS:
        return []
    runs = _longest_common_runs(line, action)
    found = []
    for line_start, action_start, length in runs:
        entity = line[line_start : line_start + length]
        cue = _blank_out(line, line_start, length)
        answer = _blank_out(action, action_start, length)
        if has_content(entity) and has_content(cue) and has_content(answer):
            found.append(Occurrence(cue, answer, entity))
    return found


def _longest_common_runs(left: Words, right: Words) -> list[tuple[int, int, int]]:
    """Return (start in left, start in right, length) of all longest common runs."""
    runs: list[tuple[int, int, int]] = []
    longest = 1
    for i in range(len(left)):
        for j in range(len(right)):
            length = 0
            while i + length < len(left) and j + length < len(right) and left[i + length] == right[j + length]:
                length += 1
            if length > longest:
                runs, longest = [], length
            if length == longest:
                runs.append((i, j, length))
    return runs


def _blank_out(words: Words, start: int, length: int) -> Words:
    return (*words[:start], BLANK, *words[start + length :])


def has_content(words: Words) -> bool:
    return any(word != BLANK and word not in STOP_WORDS for word in words)


def are_rivals(one: Words, other: Words) -> bool:
    """Whether two actions are minimal contrasts: one short span differs, and a blank and a word with content do not."""
    if one == other:
        return False
    shortest = min(len(one), len(other))
    start = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    end = next((i for i in range(shortest - start) if one[-1 - i] != other[-1 - i]), shortest - start)
    spans = one[start : len(one) - end], other[start : len(other) - end]
    shared = one[:start] + one[len(one) - end :]
    return (
        all(0 < len(span) <= MAX_SPAN_WORDS and BLANK not in span for span in spans)
        and BLANK in shared
        and has_content(shared)
    )


def find_best_actions(
    tallies: dict[Words, dict[Words, Tally]], *, significance: float = SIGNIFICANCE
) -> list[Contrast]:
    """Return, per cue, the action that beats its rivals beyond chance, the surest first.

    The many tests of one call are held to a false discovery rate of `significance` (Benjamini and Hochberg), or a
    hundred cues would bring five false lessons.
    """
    contrasts = [contrast for cue, actions in tallies.items() for contrast in _contrast_cue(cue, actions)]
    if not contrasts:
        return []
    adjusted = false_discovery_control([contrast.p_value for contrast in contrasts])
    best: dict[Words, Contrast] = {}
    for contrast, p_value in zip(contrasts, adjusted, strict=True):
        if p_value < significance and _is_surer(contrast, best.get(contrast.cue)):
            best[contrast.cue] = contrast
    return sorted(best.values(), key=lambda contrast: (contrast.p_value, contrast.text))


def _is_surer(contrast: Contrast, other: Contrast | None) -> bool:
    return other is None or (contrast.p_value, -contrast.tally.wins) < (other.p_value, -other.tally.wins)


def _contrast_cue(cue: Words, actions: dict[Words, Tally]) -> list[Contrast]:
    found = []
    for action, tally in actions.items():
        rivals = [other for name, other in actions.items() if are_rivals(action, name)]
        otherwise = sum(rivals, Tally())
        is_testable = min(tally.num_tries, otherwise.num_tries) >= MIN_TRIES
        if tally.wins > 0 and is_testable and len(tally.entities) >= MIN_ENTITIES:
            found.append(Contrast(cue, action, tally, otherwise, _test(tally, otherwise)))
    return found


def _test(tally: Tally, otherwise: Tally, *, is_better: bool = True) -> float:
    """Return the p-value of one-sided exact tests (Fisher) by outcome and by survival, the smaller one doubled."""
    alternative = "greater" if is_better else "less"
    tables = [(tally.by_outcome, otherwise.by_outcome), (tally.by_survival, otherwise.by_survival)]
    return min(1.0, 2 * min(float(fisher_exact(table, alternative=alternative).pvalue) for table in tables))


def find_refuted(tallies: dict[Words, dict[Words, Tally]], texts: Iterable[str]) -> list[Contrast]:
    """Return those of the believed `texts` that did significantly worse than their rivals."""
    refuted = []
    for text in sorted(texts):
        cue_text, arrow, action_text = text.partition(ARROW)
        cue, action = tuple(cue_text.split()), tuple(action_text.split())
        actions = tallies.get(cue, {})
        if not arrow or action not in actions:
            continue
        otherwise = sum((other for name, other in actions.items() if are_rivals(action, name)), Tally())
        p_value = _test(actions[action], otherwise, is_better=False)
        if p_value < SIGNIFICANCE:
            refuted.append(Contrast(cue, action, actions[action], otherwise, p_value))
    return refuted
