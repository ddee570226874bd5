"""Finding by word, whatever the words are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory.database import Database
from memory.searchables import Searchable
from memory.store import leave
from memory.words import WordIndex, quote_terms


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """A file of the index's own, as it has beside PostgreSQL."""
    database = Database(tmp_path / "words.db", prepare=leave)
    yield database
    database.close()


@pytest.fixture
def words(database: Database) -> WordIndex:
    index = WordIndex(database)
    database.write_sync(index.create)
    return index


def hold(words: WordIndex, database: Database, *entries: Searchable, forget: tuple[str, ...] = ()) -> None:
    row_ids = forget or [entry.row_id for entry in entries]
    database.write_sync(lambda session: words.replace(session, "insights", row_ids, entries))


def test_the_best_match_comes_first_and_filters_hold(words: WordIndex, database: Database):
    hold(
        words,
        database,
        Searchable("one", "frying carrots", "kitchen", "cooking", "t1"),
        Searchable("both", "fry the carrot with the stove", "kitchen", "cooking", "t2"),
        Searchable("other", "fry the carrot with the stove", "garden", "cooking", "t3"),
    )
    where = {"environment": "kitchen", "kind": "cooking"}
    assert words.find("insights", "carrot stove", where, 5) == ["both", "one"]
    assert words.find("insights", "carrot stove", where, 5, exclude_task="t2") == ["one"]
    assert words.find("insights", "carrot", {}, 1) != []
    assert words.find("exemplars", "carrot", {}, 5) == []
    with pytest.raises(ValueError, match="cannot filter by"):
        words.find("insights", "carrot", {"row_id": "x"}, 5)


def test_what_is_held_again_is_held_once_and_what_is_forgotten_is_gone(words: WordIndex, database: Database):
    for text in ("fry", "roast"):
        hold(words, database, Searchable("a", text))
    assert words.find("insights", "fry", {}, 5) == [] and words.find("insights", "roast", {}, 5) == ["a"]
    hold(words, database, forget=("a",))
    assert words.count()["insights"] == 0 and not words.has_any("insights", {})


def test_common_words_find_nothing_by_themselves(words: WordIndex, database: Database):
    hold(words, database, Searchable("a", "the end of the road"))
    assert words.find("insights", "what is the use of it", {}, 5) == []


@pytest.mark.parametrize(
    "text",
    [
        '"',
        "a OR",
        "NEAR(",
        "text:fry",
        "-fry",
        "fry*",
        "(",
        "^fry",
        "'; DROP TABLE words; --",
        "\x00",
        "\ud800",
        "+",
        "{a b}",
    ],
)
def test_no_text_is_an_operator(words: WordIndex, database: Database, text: str):
    hold(words, database, Searchable("a", "fry the carrot"))
    found = words.find("insights", text, {}, 5)
    assert found == (["a"] if "fry" in text else [])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80))
def test_any_text_can_be_asked_and_held(words: WordIndex, database: Database, text: str):
    hold(words, database, Searchable("a", text))
    found = words.find("insights", text, {}, 5)
    assert found in ([], ["a"]) and (quote_terms(text) or not found)
