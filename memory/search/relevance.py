"""Decides whether what the index found is worth showing to somebody who did not ask for it.

A nearest row exists for every question. Its similarity alone says little: among more rows the nearest unrelated one is
nearer, and short greetings share all of their words with something. So meaning and words must agree, and the floor
rises with the logarithm of the number of rows. The constants were fitted on real collections of 127 to 2,050 passages
(`python -m tests.bench.relevance` measures them again); beyond 5,000 rows the floor stays, for want of data.

Hazard: the similarities are those of the embedded encoder, all-MiniLM-L6-v2. Another encoder needs other constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BASE_FLOOR = 0.098
FLOOR_PER_LOG_ROW = 0.067
FEWEST_ROWS, MOST_ROWS = 100, 5_000
AGREEMENT_WEIGHT = 0.6  # of the similarity, where AGREEING_WORDS matched words support it; fewer count in proportion
AGREEING_WORDS = 3.0
WORDS_WEIGHT = 0.5
ENOUGH_WORDS = 2.0  # matched words, each as rare as can be, from which on their share of the question counts in full
WORDS_ALONE_FLOOR = 0.6  # where the index of meanings gave no answer
MIN_SIMILARITY = 0.3  # cosine; what is further away than this only distracts
MIN_RELEVANCE = 0.2  # of what is shown beside a relevant row
MAX_FOUND_BY_WORD = 10  # rows beside the nearest ones; more of them do not change recall
NUM_BEST = 5  # of the nearest rows: a row found by word alone that cannot rank among so many is left out


@dataclass(frozen=True)
class WordMatch:
    """How much of a question a row repeats."""

    row_id: str
    coverage: float
    """Share of the weight of the question's words that the row has, in [0, 1]."""
    num_words: float
    """The weight of the shared words, in units of a word that no row has."""

    @property
    def evidence(self) -> float:
        """The coverage, discounted where few or common words are behind it; in [0, 1]."""
        return self.coverage * min(1.0, self.num_words / ENOUGH_WORDS)


@dataclass(frozen=True)
class WordMatches:
    """The rows that share words with a question, best first, and how many rows were looked through."""

    matches: list[WordMatch]
    num_rows: int


@dataclass(frozen=True)
class Match:
    """One row that a question found."""

    row_id: str
    similarity: float | None
    """Cosine of question and row; None where the vector index gave no answer in time."""
    words: WordMatch

    @property
    def score(self) -> float:
        """What rows are ranked by."""
        return (self.similarity or 0.0) + self.words.coverage

    @property
    def relevance(self) -> float:
        """The value that the floor is compared with, where the similarity is known."""
        similarity = self.similarity or 0.0
        agreement = max(0.0, similarity) * min(1.0, self.words.num_words / AGREEING_WORDS)
        return similarity + AGREEMENT_WEIGHT * agreement + WORDS_WEIGHT * self.words.evidence

    def reaches(self, floor: float) -> bool:
        """Whether the row is relevant by meaning and words, or by words alone where meanings gave no answer."""
        return self.words.evidence >= WORDS_ALONE_FLOOR if self.similarity is None else self.relevance >= floor


def floor_of(num_rows: int) -> float:
    """Return the relevance that the best of so many rows needs."""
    return BASE_FLOOR + FLOOR_PER_LOG_ROW * math.log(min(max(num_rows, FEWEST_ROWS), MOST_ROWS))


def select_relevant(matches: Sequence[Match], num_rows: int) -> list[Match]:
    """Return what is worth showing, best first: nothing unless one row reaches the floor; beside it, whatever is not
    plainly unrelated, because an answer may need several passages."""
    floor = floor_of(num_rows)
    if not any(match.reaches(floor) for match in matches):
        return []
    return [match for match in matches if match.reaches(MIN_RELEVANCE)]


def choose_found_by_word(by_word: Sequence[WordMatch], nearest: Mapping[str, float]) -> list[str]:
    """Return the ids of rows found by word alone that may rank among the best. None of them is more similar than the
    last of the nearest rows, which bounds their score: most questions have no such row, and need no comparison."""
    coverages = {match.row_id: match.coverage for match in by_word}
    scores = sorted((near + coverages.get(row_id, 0.0) for row_id, near in nearest.items()), reverse=True)
    least = scores[NUM_BEST - 1] if len(scores) >= NUM_BEST else -math.inf
    furthest = min(nearest.values(), default=1.0)
    others = [match for match in by_word if match.row_id not in nearest][:MAX_FOUND_BY_WORD]
    return [match.row_id for match in others if furthest + match.coverage >= least]


def join_matches(by_word: Sequence[WordMatch], similarities: Mapping[str, float] | None, num: int) -> list[Match]:
    """Return the rows whose similarity is known, best first, each with the words it shares. Where no similarity is,
    return the best `num` rows by word."""
    words = {match.row_id: match for match in by_word}
    if similarities is None:
        return [Match(match.row_id, None, match) for match in by_word[:num]]
    joined = [Match(it, near, words.get(it, WordMatch(it, 0.0, 0.0))) for it, near in similarities.items()]
    return sorted(joined, key=lambda match: -match.score)
