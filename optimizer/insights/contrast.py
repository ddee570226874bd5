"""Finds lessons by counting, where no model writes prose: which action, for which instruction, goes with success.

The input is lines of text, actions and outcomes, of whatever environment. The episode read "fry the carrot" and
did "cook carrot with stove": the words they share are the entity, and the rest is a cue and an action, "fry the _" and
"cook _ with stove". Over many episodes and entities the cue meets competing actions, and one of them survives.

Flow: trajectory -> answers (cue, action, entity, blame) -> outcomes per cue -> exact test -> the surest lesson -> the
answers it does not explain -> outcomes -> ... until nothing is sure.

Two tests. Some environments punish at once, others late, and an episode that did one thing right may be lost by
another. Each action is therefore tested by two counts, and either will do, at the price of testing twice. By outcome:
episodes won and not won. By survival: blame for a lost episode falls with the distance to its end, by `BLAME_DISCOUNT`
a step, as a discounted return does; the action before the end bears the loss in full, one three steps earlier an
eighth. An action that never was part of a success is no lesson, however well it survives.

Minimal contrasts. Many actions share a word with an instruction: the carrot is also taken, and sliced. Only actions
that differ in one span of words ("cook _ with stove", "cook _ with oven") are rival answers to the same cue; the rest
are other parts of the plan. A cue that met only one action carries no contrast, and no lesson.

One lesson at a time. An episode read both "dice the carrot" and "you take the carrot from the fridge": when dicing goes
well, it goes well for both cues. The outcome of an answer is therefore credited to its surest cue alone, as in a
stepwise selection, and not counted again for the others, which keep only the outcomes they explain by themselves.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from scipy.stats import false_discovery_control, fisher_exact

from memory.records.exemplars import render_call
from memory.records.insights import InsightOperation, OperationKind, SupportCounts
from memory.schema import Insight, StepKind
from optimizer.rewards import GradedTrajectory

BLANK = "_"
ARROW = " -> "
BLAME_DISCOUNT = 0.5
SIGNIFICANCE = 0.05
MAX_LINE_WORDS = 12  # an instruction is short; longer lines tell a story
MIN_TRIES = 3  # on either side; fewer cannot be significant, and only dilute the many tests
MIN_ENTITIES = 2  # a blank that one thing always fills is no blank
MAX_SPAN_WORDS = 3  # of the span in which two rival actions may differ
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


@dataclass(frozen=True)
class Answer:
    """One occurrence in one episode, and how that episode ended."""

    occurrence: Occurrence
    deeds: frozenset[tuple[int, int]]
    """(episode, position of the action in it); the same may be done twice."""
    is_success: bool
    blame: float
    """For a lost episode; at most 1."""


@dataclass
class Outcomes:
    """The outcomes of the episodes that answered a cue with an action."""

    wins: int = 0
    """Episodes won."""
    losses: float = 0.0
    """Blame for episodes lost, at most 1 each."""
    num_tries: int = 0
    entities: set[Words] = field(default_factory=set)
    """The words that filled the blank."""

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(
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
        # Fisher's test takes whole counts
        losses = round(self.losses)
        return self.num_tries - losses, losses


@dataclass(frozen=True)
class Contrast:
    """A cue, the action that answers it, and how it did against its rivals."""

    cue: Words
    action: Words
    outcomes: Outcomes
    otherwise: Outcomes
    p_value: float

    @property
    def text(self) -> str:
        return f"{' '.join(self.cue)}{ARROW}{' '.join(self.action)}"

    @property
    def support(self) -> SupportCounts:
        return SupportCounts(
            self.outcomes.wins, round(self.outcomes.losses), self.otherwise.wins, round(self.otherwise.losses)
        )


def contrast_insights(
    graded: Iterable[GradedTrajectory], *, known: Sequence[Insight], significance: float = SIGNIFICANCE
) -> list[InsightOperation]:
    """Return ADD or AGREE for the best action of each cue, and REMOVE for known insights that the outcomes refute."""
    by_scope: dict[tuple[str, str], list[GradedTrajectory]] = defaultdict(list)
    for each in graded:
        by_scope[(each.trajectory.environment or "", each.trajectory.kind)].append(each)
    operations: list[InsightOperation] = []
    for (environment, kind), episodes in sorted(by_scope.items()):
        answers = find_answers(episodes)
        believed = {insight.text for insight in known if (insight.environment, insight.kind) == (environment, kind)}
        lessons, unexplained = find_lessons(answers, significance=significance)
        taught = {lesson.text for lesson in lessons}
        for lesson in sorted(lessons, key=lambda lesson: (lesson.p_value, lesson.text)):
            verb = OperationKind.AGREE if lesson.text in believed else OperationKind.ADD
            operations.append(InsightOperation(verb, environment, kind, lesson.text, counts=lesson.support))
        # not what was taught just now: ADD and REMOVE of one text would cancel each other
        refuted = find_refuted(count_outcomes(answers), count_outcomes(unexplained), believed - taught)
        operations += [
            InsightOperation(OperationKind.REMOVE, environment, kind, lesson.text, counts=lesson.support)
            for lesson in refuted
        ]
    return operations


def find_answers(episodes: Iterable[GradedTrajectory]) -> list[Answer]:
    """Return each (cue, action, entity) once an episode, with the most blame that any of its actions bears."""
    answers = []
    for number, each in enumerate(episodes):
        occurrences: dict[Occurrence, list[tuple[int, int]]] = defaultdict(list)
        for occurrence, position, num_actions_after in find_occurrences(each):
            occurrences[occurrence].append((position, num_actions_after))
        for occurrence, uses in occurrences.items():
            deeds = frozenset((number, position) for position, _ in uses)
            # of the last use: the nearest to the end bears the most blame
            blame = 0.0 if each.is_success else BLAME_DISCOUNT ** min(after for _, after in uses)
            answers.append(Answer(occurrence, deeds, each.is_success, blame))
    return answers


def count_outcomes(answers: Iterable[Answer]) -> dict[Words, dict[Words, Outcomes]]:
    """Count, per cue and action, the episodes they were seen in."""
    outcomes: dict[Words, dict[Words, Outcomes]] = defaultdict(lambda: defaultdict(Outcomes))
    for answer in answers:
        counts = outcomes[answer.occurrence.cue][answer.occurrence.action]
        counts.num_tries += 1
        counts.entities.add(answer.occurrence.entity)
        counts.wins += answer.is_success
        counts.losses += answer.blame
    return outcomes


def find_lessons(
    answers: Sequence[Answer], *, significance: float = SIGNIFICANCE
) -> tuple[list[Contrast], list[Answer]]:
    """Return the lessons, the surest first, and the answers that none of them explains."""
    lessons: list[Contrast] = []
    # ends: each round removes at least the answers of its own lesson. All tests are made again each round
    while best := find_best_actions(count_outcomes(answers), significance=significance):
        surest = best[0]
        lessons.append(surest)
        # rivals too: chopping after "dice the carrot" failed at that cue, not at another one that was read as well
        explained = {
            deed
            for answer in answers
            if answer.occurrence.cue == surest.cue and _competes(answer.occurrence.action, surest.action)
            for deed in answer.deeds
        }
        answers = [answer for answer in answers if not answer.deeds <= explained]
    return lessons, list(answers)


def _competes(action: Words, best: Words) -> bool:
    return action == best or are_rivals(action, best)


def find_occurrences(each: GradedTrajectory) -> Iterator[tuple[Occurrence, int, int]]:
    """Yield every answer to a cue in one episode, with its action's position and the number of actions after that.

    Lines come from the task text and from tool results before the action; never from the memory segment, whose words
    must not be extracted again.
    """
    lines = dict.fromkeys(read_lines(each.trajectory.task_text))
    answers: list[tuple[int, Occurrence]] = []
    num_actions = 0
    for step in each.steps:
        if step.kind is StepKind.TOOL:
            # only results of tools before the action: what was read later cannot have been followed
            lines.update(dict.fromkeys(read_lines(step.content)))
            continue
        for call in step.tool_calls:
            action = read_words(render_call(call))
            answers += [(num_actions, occurrence) for line in lines for occurrence in align(line, action)]
            num_actions += 1
    for position, occurrence in answers:
        yield occurrence, position, num_actions - 1 - position


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
    # cubic at worst: `left` has at most MAX_LINE_WORDS words, `right` those of one call
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
    # not beyond `start`: prefix and suffix must not count the same words twice
    end = next((i for i in range(shortest - start) if one[-1 - i] != other[-1 - i]), shortest - start)
    spans = one[start : len(one) - end], other[start : len(other) - end]
    shared = one[:start] + one[len(one) - end :]
    return (
        all(0 < len(span) <= MAX_SPAN_WORDS and BLANK not in span for span in spans)
        and BLANK in shared
        and has_content(shared)
    )


def find_best_actions(
    outcomes: dict[Words, dict[Words, Outcomes]], *, significance: float = SIGNIFICANCE
) -> list[Contrast]:
    """Return, per cue, the action that beats its rivals beyond chance, the surest first.

    The many tests of one call are held to a false discovery rate of `significance` (Benjamini and Hochberg), or a
    hundred cues would bring five false lessons.
    """
    contrasts = [contrast for cue, actions in outcomes.items() for contrast in _contrast_cue(cue, actions)]
    if not contrasts:
        return []
    adjusted = false_discovery_control([contrast.p_value for contrast in contrasts])
    best: dict[Words, Contrast] = {}
    for contrast, p_value in zip(contrasts, adjusted, strict=True):
        if p_value < significance and _is_surer(contrast, best.get(contrast.cue)):
            best[contrast.cue] = contrast
    return sorted(best.values(), key=lambda contrast: (contrast.p_value, contrast.text))


def _is_surer(contrast: Contrast, other: Contrast | None) -> bool:
    return other is None or (contrast.p_value, -contrast.outcomes.wins) < (other.p_value, -other.outcomes.wins)


def _contrast_cue(cue: Words, actions: dict[Words, Outcomes]) -> list[Contrast]:
    found = []
    for action, outcomes in actions.items():
        rivals = [other for name, other in actions.items() if are_rivals(action, name)]
        otherwise = sum(rivals, Outcomes())
        is_testable = min(outcomes.num_tries, otherwise.num_tries) >= MIN_TRIES
        if outcomes.wins > 0 and is_testable and len(outcomes.entities) >= MIN_ENTITIES:
            found.append(Contrast(cue, action, outcomes, otherwise, _test(outcomes, otherwise)))
    return found


def _test(outcomes: Outcomes, otherwise: Outcomes, *, is_better: bool = True) -> float:
    """Return the p-value of one-sided exact tests (Fisher) by outcome and by survival, the smaller one doubled."""
    alternative = "greater" if is_better else "less"
    tables = [(outcomes.by_outcome, otherwise.by_outcome), (outcomes.by_survival, otherwise.by_survival)]
    return min(1.0, 2 * min(_p_value(table, alternative) for table in tables))


def find_refuted(
    outcomes: dict[Words, dict[Words, Outcomes]],
    unexplained: dict[Words, dict[Words, Outcomes]],
    texts: Iterable[str],
) -> list[Contrast]:
    """Return the known `texts` that the outcomes refute.

    Either they did significantly worse than their rivals, or nearly all their outcomes are explained by surer lessons.
    """
    refuted = []
    for text in sorted(texts):
        cue_text, arrow, action_text = text.partition(ARROW)
        cue, action = tuple(cue_text.split()), tuple(action_text.split())
        mine = outcomes.get(cue, {}).get(action)
        if not arrow or mine is None:
            continue
        otherwise = sum((other for name, other in outcomes[cue].items() if are_rivals(action, name)), Outcomes())
        p_value = _test(mine, otherwise, is_better=False)
        own = unexplained.get(cue, {}).get(action, Outcomes())
        if p_value < SIGNIFICANCE or own.num_tries < MIN_TRIES <= mine.num_tries:
            refuted.append(Contrast(cue, action, mine, otherwise, p_value))
    return refuted


def _p_value(table: tuple[tuple[float, float], tuple[float, float]], alternative: str) -> float:
    # scipy's own type says tuple; the result has a name for each value
    return float(cast(Any, fisher_exact(table, alternative=alternative)).pvalue)
