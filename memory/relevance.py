"""Decides whether what the index found is worth showing to somebody who did not ask for it.

A nearest row exists for every question. Its similarity alone says little: among more rows the nearest unrelated one is
nearer, and short greetings share all of their words with something. So meaning and words must agree, and the bar rises
with the logarithm of the number of rows. The constants were fitted on real collections of 110 to 2,050 passages
(`python -m tests.bench.relevance` measures them again); beyond 10,000 rows the bar stays, for want of data.

Hazard: the similarities are those of the embedded encoder, all-MiniLM-L6-v2. Another encoder needs other constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BASE_FLOOR = 0.23
FLOOR_PER_LOG_ROW = 0.03
FEWEST_ROWS, MOST_ROWS = 100, 10_000
WORDS_WEIGHT = 0.4
ENOUGH_WORDS = 2.0  # matched words, each as rare as can be, from which on their share of the question counts in full
WORDS_ALONE_FLOOR = 0.6  # where the index of meanings gave no answer
MIN_SIMILARITY = 0.3  # cosine; what is further away than this only distracts
MIN_RELEVANCE = 0.2  # of what is shown beside a relevant row
BEYOND_NEAREST = 0.8  # of the last of the nearest rows' similarity: what a row is taken to have that is not among them


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
    """Cosine of question and row, or an estimate; None where meanings gave no answer in time."""
    words: WordMatch
    is_near: bool = True
    """Whether the row is among the nearest by meaning, so that its similarity is known."""

    @property
    def score(self) -> float:
        """What rows are ranked by."""
        return (self.similarity or 0.0) + self.words.coverage

    @property
    def relevance(self) -> float:
        """What the floor is compared with, where meanings answered."""
        return (self.similarity or 0.0) + WORDS_WEIGHT * self.words.evidence

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


def join_matches(by_word: Sequence[WordMatch], by_meaning: Sequence[tuple[str, float]] | None) -> list[Match]:
    """Return everything that either index found, best first. Of a row that is not among the nearest, the similarity is
    estimated."""
    words = {match.row_id: match for match in by_word}
    similarities = dict(by_meaning or ())
    furthest = BEYOND_NEAREST * min(similarities.values(), default=0.0)
    joined = [
        Match(
            row_id,
            None if by_meaning is None else similarities.get(row_id, furthest),
            words.get(row_id, WordMatch(row_id, 0.0, 0.0)),
            row_id in similarities,
        )
        for row_id in dict.fromkeys([*similarities, *words])
    ]
    return sorted(joined, key=lambda match: -match.score)
