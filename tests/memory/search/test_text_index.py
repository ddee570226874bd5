"""Full-text search, for any text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from memory.search.indexed_rows import IndexedRow, IndexQuery
from memory.search.text_index import TextIndex, quote_terms
from memory.storage.database import Database
from memory.store import prepare_nothing


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """The index's own SQLite file, as used beside PostgreSQL."""
    database = Database(tmp_path / "words.db", prepare=prepare_nothing)
    yield database
    database.close()


@pytest.fixture
def words(database: Database) -> TextIndex:
    index = TextIndex(database)
    database.write_sync(index.create)
    return index


def hold(words: TextIndex, database: Database, *entries: IndexedRow, forget: tuple[str, ...] = ()) -> None:
    row_ids = forget or [entry.row_id for entry in entries]
    database.write_sync(lambda session: words.replace(session, "insights", row_ids, entries))


def test_the_best_match_comes_first_and_filters_hold(words: TextIndex, database: Database):
    hold(
        words,
        database,
        IndexedRow("one", "frying carrots", "kitchen", "cooking", "t1"),
        IndexedRow("both", "fry the carrot with the stove", "kitchen", "cooking", "t2"),
        IndexedRow("other", "fry the carrot with the stove", "garden", "cooking", "t3"),
    )
    where = {"environment": "kitchen", "kind": "cooking"}
    assert words.find(IndexQuery("insights", "carrot stove", where, 5)) == ["both", "one"]
    assert words.find(IndexQuery("insights", "carrot stove", where, 5, exclude_task="t2")) == ["one"]
    assert words.find(IndexQuery("insights", "carrot", {}, 1)) != []
    assert words.find(IndexQuery("exemplars", "carrot", {}, 5)) == []
    with pytest.raises(ValueError, match="cannot filter by"):
        words.find(IndexQuery("insights", "carrot", {"row_id": "x"}, 5))


def test_what_is_held_again_is_held_once_and_what_is_forgotten_is_gone(words: TextIndex, database: Database):
    for told in ("fry", "roast"):
        hold(words, database, IndexedRow("a", told))
    assert words.find(IndexQuery("insights", "fry", {}, 5)) == []
    assert words.find(IndexQuery("insights", "roast", {}, 5)) == ["a"]
    hold(words, database, forget=("a",))
    assert words.count()["insights"] == 0 and not words.has_any("insights", {})


def test_rows_that_are_held_again_count_once(words: TextIndex, database: Database):
    for row_id in ("a", "b", "a", "b", "a"):
        hold(words, database, IndexedRow(row_id, "boil"))
    assert words.match(IndexQuery("insights", "boil", {}, 5)).num_rows == 2


def test_what_is_common_elsewhere_is_telling_where_it_is_rare(
    words: TextIndex, database: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("memory.search.text_index.MAX_ROWS", 5)
    crowd = [IndexedRow(f"theirs{number}", "refund of an order", tenant="many") for number in range(9)]
    hold(words, database, *crowd, IndexedRow("mine", "refund of a late order", tenant="few"))
    assert words.find(IndexQuery("insights", "refund", {"tenant": "few"}, 5)) == ["mine"]
    assert words.find(IndexQuery("insights", "refund", {"tenant": "none"}, 5)) == []
    assert words.find(IndexQuery("insights", "refund order", {"tenant": "many"}, 3)) == []
    assert len(words.find_by_common_words(IndexQuery("insights", "refund order", {"tenant": "many"}, 3))) == 3


def test_a_rare_word_outweighs_common_ones(words: TextIndex, database: Database):
    crowd = [IndexedRow(f"row{number}", f"fry the carrot in pan {number}") for number in range(20)]
    hold(words, database, *crowd, IndexedRow("rare", "saffron"))
    assert words.find(IndexQuery("insights", "fry carrot with saffron", {}, 2))[0] == "rare"


def test_an_index_without_partitions_is_built_anew(database: Database):
    def write_old(session):
        session.execute(text("CREATE TABLE word_entries (id INTEGER PRIMARY KEY, row_id TEXT)"))
        session.execute(text("CREATE VIRTUAL TABLE words USING fts5(text)"))

    database.write_sync(write_old)
    words = TextIndex(database)
    database.write_sync(words.create)
    hold(words, database, IndexedRow("a", "fry"))
    assert words.find(IndexQuery("insights", "fry", {}, 5)) == ["a"]


def test_common_words_find_nothing_by_themselves(words: TextIndex, database: Database):
    hold(words, database, IndexedRow("a", "the end of the road"))
    assert words.find(IndexQuery("insights", "what is the use of it", {}, 5)) == []


@pytest.mark.parametrize(
    "told",
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
def test_no_text_is_an_operator(words: TextIndex, database: Database, told: str):
    hold(words, database, IndexedRow("a", "fry the carrot"))
    found = words.find(IndexQuery("insights", told, {}, 5))
    assert found == (["a"] if "fry" in told else [])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80))
def test_any_text_can_be_asked_and_held(words: TextIndex, database: Database, told: str):
    hold(words, database, IndexedRow("a", told))
    found = words.find(IndexQuery("insights", told, {}, 5))
    assert found in ([], ["a"]) and (quote_terms(told) or not found)
