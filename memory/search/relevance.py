"""Decides whether search results are relevant enough to be shown to somebody who did not ask for them.

Every query has a nearest row, and its similarity alone says little: the more rows there are, the nearer the nearest
unrelated one is, and short greetings share all of their words with some row. So similarity and shared words must agree,
and the floor rises with the logarithm of the number of rows. The constants were fitted on real collections of 127 to
2,050 passages (`python -m tests.bench.relevance` measures them again); above 5,000 rows, where no data was measured,
the floor stays constant.

Hazard: the similarities are those of the embedded encoder, all-MiniLM-L6-v2. Another encoder needs other constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BASE_FLOOR = 0.098
FLOOR_PER_LOG_ROW = 0.067
FEWEST_ROWS, MOST_ROWS = 100, 5_000
AGREEMENT_WEIGHT = 0.6  # of the similarity when AGREEING_WORDS matched words support it; fewer count in proportion
AGREEING_WORDS = 3.0
WORDS_WEIGHT = 0.5
ENOUGH_WORDS = 2.0  # matched words of the greatest rarity from which on the coverage counts in full
WORDS_ALONE_FLOOR = 0.6  # of the discounted coverage, when the vector index gave no answer
MIN_SIMILARITY = 0.3  # cosine; rows further away than this only distract
MIN_RELEVANCE = 0.2  # of rows that are shown beside a relevant one
MAX_WORD_ONLY_ROWS = 10  # compared beside the nearest rows; more of them do not change recall
NUM_BEST = 5  # a row found by word alone that cannot rank among the best five is not compared


@dataclass(frozen=True)
class WordMatch:
    """How much of a query a row repeats."""

    row_id: str
    coverage: float
    """Share of the weight of the query's words that the row has, in [0, 1]."""
    num_words: float
    """The weight of the shared words, in units of the weight of a word that no row has."""

    @property
    def discounted_coverage(self) -> float:
        """The coverage, discounted when few or common words make it up; in [0, 1]."""
        return self.coverage * min(1.0, self.num_words / ENOUGH_WORDS)


@dataclass(frozen=True)
class WordMatches:
    """The rows that share words with a query, best first, and the number of rows that were searched."""

    matches: list[WordMatch]
    num_rows: int


@dataclass(frozen=True)
class Match:
    """One row that a query found."""

    row_id: str
    similarity: float | None
    """Cosine similarity of query and row; None where the vector index gave no answer in time."""
    word_match: WordMatch

    @property
    def score(self) -> float:
        """The value that rows are ranked by."""
        return (self.similarity or 0.0) + self.word_match.coverage

    @property
    def relevance(self) -> float:
        """The value that is compared with the floor when the similarity is known."""
        similarity = self.similarity or 0.0
        agreement = max(0.0, similarity) * min(1.0, self.word_match.num_words / AGREEING_WORDS)
        return similarity + AGREEMENT_WEIGHT * agreement + WORDS_WEIGHT * self.word_match.discounted_coverage

    def reaches(self, floor: float) -> bool:
        """Whether the row is relevant by similarity and words, or by words alone without a similarity."""
        if self.similarity is None:
            return self.word_match.discounted_coverage >= WORDS_ALONE_FLOOR
        return self.relevance >= floor


def floor_of(num_rows: int) -> float:
    """Return the relevance that the best of `num_rows` rows must reach."""
    return BASE_FLOOR + FLOOR_PER_LOG_ROW * math.log(min(max(num_rows, FEWEST_ROWS), MOST_ROWS))


def select_relevant(matches: Sequence[Match], num_rows: int) -> list[Match]:
    """Return the rows that are worth showing, best first.

    Nothing is shown unless one row reaches the floor. Beside it, all rows above `MIN_RELEVANCE` are returned, because
    an answer may need several passages.
    """
    floor = floor_of(num_rows)
    if not any(match.reaches(floor) for match in matches):
        return []
    return [match for match in matches if match.reaches(MIN_RELEVANCE)]


def select_word_only_rows(by_word: Sequence[WordMatch], nearest: Mapping[str, float]) -> list[str]:
    """Return the ids of rows found by word alone that may rank among the best.

    `nearest` holds the similarity of the nearest rows, by id. No other row is more similar than the last of them, which
    bounds the score of the others: most queries have no such row and need no further comparison.
    """
    coverages = {match.row_id: match.coverage for match in by_word}
    scores = sorted((near + coverages.get(row_id, 0.0) for row_id, near in nearest.items()), reverse=True)
    least = scores[NUM_BEST - 1] if len(scores) >= NUM_BEST else -math.inf
    furthest = min(nearest.values(), default=1.0)
    others = [match for match in by_word if match.row_id not in nearest][:MAX_WORD_ONLY_ROWS]
    return [match.row_id for match in others if furthest + match.coverage >= least]


def join_matches(by_word: Sequence[WordMatch], similarities: Mapping[str, float] | None, num: int) -> list[Match]:
    """Return the rows whose similarity is known, best first, each with the words it shares with the query; the best
    `num` rows by word where `similarities` is None."""
    words = {match.row_id: match for match in by_word}
    if similarities is None:
        return [Match(match.row_id, None, match) for match in by_word[:num]]
    joined = [Match(it, near, words.get(it, WordMatch(it, 0.0, 0.0))) for it, near in similarities.items()]
    return sorted(joined, key=lambda match: -match.score)
