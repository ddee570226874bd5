"""Find rows by word: SQLite's FTS5, in the rows' own file, or in one beside the index of meanings.

This module refuses to know meanings, and never trusts a query: any text of a user's is safe, because every word of
it is quoted. It is an index: its tables are made anew from the rows whenever they are missing or damaged.

The rows of one place (tenant, person, environment, kind of a collection) have ids in a range of their own, so that FTS5
looks for a word there and nowhere else. It ranks by how rare the shared words are there, as BM25 does; but FTS5's own
`bm25` reads every row that has any of the words, of all tenants, and takes a second among a million rows.

Invariant: a question reads at most `MAX_ROWS` rows for each of its words, however many there are.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import islice

from sqlalchemy import TextClause, text
from sqlmodel import Session

from memory.scopes import EVERYBODY
from memory.search.indexed_rows import COLLECTIONS, PLACE, IndexedRow, Place
from memory.search.relevance import FEWEST_ROWS, MOST_ROWS, WordMatch, WordMatches
from memory.storage.database import Database

WRITE_BATCH = 1000
MAX_TERMS = 32
MAX_ROWS = 200  # a word that more rows of a place have says little there
MAX_COUNTED = MOST_ROWS  # rows of a place that are counted one by one; the floor of relevance rises no further
MAX_TELLING = 12  # words of a question that rank
PLACE_BITS = 32  # of an id, for the count within its place; the other 31 count the places, a few for each person
WORD = re.compile(r"\w+")
# Words so common that sharing them says nothing.
COMMON_WORDS = """
a an and are as at be but by do for from had has have how i if in is it its me my no not of on or our so that the their
them then there these they this to was we were what when where which who why will with you your
"""
COMMON = frozenset(COMMON_WORDS.split())
TABLES = (
    "CREATE TABLE IF NOT EXISTS word_places (id INTEGER PRIMARY KEY, collection TEXT NOT NULL, tenant TEXT NOT NULL, "
    "user_id TEXT NOT NULL, environment TEXT NOT NULL, kind TEXT NOT NULL, "
    "UNIQUE (collection, tenant, user_id, environment, kind))",
    "CREATE TABLE IF NOT EXISTS word_entries (id INTEGER PRIMARY KEY, collection TEXT NOT NULL, "
    "row_id TEXT NOT NULL, task TEXT NOT NULL, digest TEXT NOT NULL, UNIQUE (collection, row_id))",
    "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(text, tokenize='porter unicode61 remove_diacritics 2')",
)
NAMES = ("words", "word_entries", "word_places")
Range = dict[str, int]
"""The first and the last id of a place."""
Weigh = Callable[[dict[str, int], int], dict[str, float]]
"""What each word of a question is worth in a place, by how many of its rows have it, and how many rows there are."""


class TextIndex:
    """The words of everything searchable. `word_entries` says what a line of `words` speaks of."""

    def __init__(self, database: Database) -> None:
        """`database`: where the index's tables are, SQLite in any case."""
        self._database = database

    def create(self, session: Session) -> None:
        """Make the tables where they are missing, or are from before rows had places, or places persons."""
        if not session.execute(_HAS_PLACES).first():
            self._drop(session)
        for statement in TABLES:
            session.execute(text(statement))

    def rebuild(self, session: Session, searchables: Mapping[str, Iterable[IndexedRow]]) -> None:
        """Drop the tables, whatever their state, and fill them again."""
        self._drop(session)
        self.create(session)
        for collection, entries in searchables.items():
            rest = iter(entries)
            while batch := list(islice(rest, WRITE_BATCH)):
                self.replace(session, collection, (), batch)

    def replace(self, session: Session, collection: str, row_ids: Iterable[str], entries: Iterable[IndexedRow]) -> None:
        """Forget `row_ids`, then hold `entries`: idempotent."""
        forgotten = [{"collection": collection, "row_id": row_id} for row_id in row_ids]
        if forgotten:
            session.execute(_FORGET_WORDS, forgotten)
            session.execute(_FORGET_ENTRY, forgotten)
        next_ids: dict[Place, int] = {}
        held, told = [], []
        for entry in entries:
            entry_id = next_ids.get(entry.place) or _next_id(session, collection, entry.place)
            next_ids[entry.place] = entry_id + 1
            values = {"id": entry_id, "collection": collection, "row_id": entry.row_id}
            held.append(values | {"task": entry.task, "digest": entry.digest})
            told.append({"id": entry_id, "text": _storable(entry.text)})
        if held:
            session.execute(_HOLD_ENTRY, held)
            session.execute(_HOLD_WORDS, told)

    def write(self, work: Callable[[Session], None]) -> None:
        """Run `work`, which may call what takes a session, in a transaction of the index's own. Blocks."""
        self._database.write_sync(work)

    def digests(self, collection: str) -> dict[str, str]:
        """Return what is held of a collection: the digest of each row, by id."""
        with self._database.read() as session:
            return {row_id: digest for row_id, digest in session.execute(_DIGESTS, {"collection": collection})}

    def count(self) -> dict[str, int]:
        """Return how many rows of each collection are held."""
        with self._database.read() as session:
            counts = {collection: num for collection, num in session.execute(_COUNTS)}
        return {collection: counts.get(collection, 0) for collection in COLLECTIONS}

    def has_any(self, collection: str, where: Mapping[str, str]) -> bool:
        """Say whether anything at all could be found."""
        ((is_any,),) = self._database.fetch(_any_at(tuple(where)), {"collection": collection, **where})
        return bool(is_any)

    def newest(
        self, collection: str, where: Mapping[str, str], num: int, *, exclude_task: str | None = None
    ) -> list[str]:
        """Return the ids of what came last of one person's own, whose `user_id` the filter names."""
        values = {"collection": collection, "num": num, "exclude_task": exclude_task or "", **where}
        return [row_id for (row_id,) in self._database.fetch(_newest_at(tuple(where)), values)]

    def partitions(self, collection: str, where: Mapping[str, str]) -> list[tuple[str, str, str]]:
        """Return (tenant, environment, kind) of what all of a tenant are shown, as far as a filter names it."""
        values = {"collection": collection, **where, "user_id": EVERYBODY}
        return [tuple(row) for row in self._database.fetch(_partitions_at(tuple(values)[1:]), values)]

    def ids_at(self, collection: str, partition: Sequence[str], num: int, *, exclude_task: str = "") -> list[str]:
        """Return the ids of the newest rows of one partition, none of them a single person's."""
        where = dict(zip(("tenant", "environment", "kind"), partition, strict=True)) | {"user_id": EVERYBODY}
        return self.newest(collection, where, num, exclude_task=exclude_task)

    def find(
        self, collection: str, query_text: str, where: Mapping[str, str], num: int, *, exclude_task: str | None = None
    ) -> list[str]:
        """Return the ids of rows that share rare words with the query, best first: those that share the rarest."""
        return [match.row_id for match in self.match(collection, query_text, where, num, exclude_task).matches]

    def match(
        self, collection: str, query_text: str, where: Mapping[str, str], num: int, exclude_task: str | None = None
    ) -> WordMatches:
        """Return the same rows, with how much of the query each of them repeats."""
        return self._find(_weigh_rare, collection, query_text, where, num, exclude_task)

    def find_by_common_words(
        self, collection: str, query_text: str, where: Mapping[str, str], num: int, *, exclude_task: str | None = None
    ) -> list[str]:
        """Return the ids of rows that share words which `MAX_ROWS` others share too: better than nothing, no more."""
        found = self._find(_weigh_common, collection, query_text, where, num, exclude_task)
        return [match.row_id for match in found.matches]

    def _find(
        self,
        weigh: Weigh,
        collection: str,
        query_text: str,
        where: Mapping[str, str],
        num: int,
        exclude_task: str | None,
    ) -> WordMatches:
        terms = quote_terms(query_text)
        hits: list[tuple[tuple[float, int], WordMatch]] = []
        num_rows_in_all = 0
        with self._database.read() as session:
            for within in _ranges(session, collection, where):
                num_rows = _num_rows(session, within)
                num_rows_in_all += num_rows
                counts = _count(session, terms, within) if terms else {}
                weights = weigh(counts, num_rows)
                most = _weight(0, num_rows)  # of one word
                in_all = sum(weights.values()) + most * sum(count == 0 for count in counts.values())
                for order, row_id in _rank(session, weights, within, num, exclude_task):
                    hits.append((order, WordMatch(row_id, -order[0] / in_all, -order[0] / most)))
        best = heapq.nsmallest(num, hits, key=lambda hit: hit[0])
        return WordMatches([match for _, match in best], num_rows_in_all)

    def _drop(self, session: Session) -> None:
        for table in NAMES:
            session.execute(text(f"DROP TABLE IF EXISTS {table}"))


def quote_terms(query_text: str) -> list[str]:
    """Return the text's telling words for FTS5: each one quoted, so that none can be an operator."""
    words = dict.fromkeys(word.casefold() for word in WORD.findall(_storable(query_text)))
    return [f'"{word}"' for word in words if word not in COMMON][:MAX_TERMS]


@cache
def _any_at(names: tuple[str, ...]) -> TextClause:
    """The question for anything in the places that these filters name."""
    return text(
        f"SELECT EXISTS (SELECT 1 FROM word_places place WHERE {_condition(names)} AND EXISTS (SELECT 1 "
        f"FROM word_entries WHERE id BETWEEN place.id << {PLACE_BITS} AND ((place.id + 1) << {PLACE_BITS}) - 1))"
    )


@cache
def _partitions_at(names: tuple[str, ...]) -> TextClause:
    """The question for the places of everybody's rows; the filter's `user_id` is nobody's."""
    return text(f"SELECT DISTINCT tenant, environment, kind FROM word_places WHERE {_condition(names)}")


@cache
def _newest_at(names: tuple[str, ...]) -> TextClause:
    return text(
        f"SELECT e.row_id FROM word_places place JOIN word_entries e ON e.id BETWEEN place.id << {PLACE_BITS} AND "
        f"((place.id + 1) << {PLACE_BITS}) - 1 WHERE {_condition(names, alias='place.')} "
        "AND place.user_id = :user_id AND (e.task <> :exclude_task OR :exclude_task = '') "
        "ORDER BY e.id DESC LIMIT :num"
    )


def _condition(names: Iterable[str], *, alias: str = "") -> str:
    """Return what is true of the places that a filter names; to name a person is to ask for what they may be shown.
    Raises: ValueError for an unknown filter."""
    unknown = set(names) - set(PLACE)
    if unknown:
        raise ValueError(f"cannot filter by {sorted(unknown)!r}: choose among {PLACE!r}")
    told = {name: f"{alias}{name} = :{name}" for name in names}
    if "user_id" in told:
        told["user_id"] = f"{alias}user_id IN ('{EVERYBODY}', :user_id)"
    return " AND ".join([f"{alias}collection = :collection", *told.values()])


def _ranges(session: Session, collection: str, where: Mapping[str, str]) -> list[Range]:
    """Return the first and last id of every place that a filter names. Raises: ValueError for an unknown filter."""
    query = text(f"SELECT id FROM word_places WHERE {_condition(where)}")
    found = session.execute(query, {"collection": collection, **where})
    return [_range(place_id) for (place_id,) in found]


def _range(place_id: int) -> Range:
    return {"first": place_id << PLACE_BITS, "last": ((place_id + 1) << PLACE_BITS) - 1}


def _next_id(session: Session, collection: str, place: Place) -> int:
    values = {"collection": collection} | dict(zip(PLACE, place, strict=True))
    session.execute(_ADD_PLACE, values)
    within = _range(session.execute(_PLACE_ID, values).scalar_one())
    last = session.execute(_LAST_ID, within).scalar_one()
    return within["first"] if last is None else last + 1


def _count(session: Session, terms: list[str], within: Range) -> dict[str, int]:
    """Return how many rows of one place have each of the words, up to `MAX_ROWS`."""
    counted = f"(SELECT count(*) FROM (SELECT rowid FROM words WHERE {_WITHIN} LIMIT {MAX_ROWS}))"
    values = [value for term in terms for value in (term, within["first"], within["last"])]
    counts = session.connection().exec_driver_sql(f"SELECT {', '.join([counted] * len(terms))}", tuple(values)).one()
    return dict(zip(terms, counts, strict=True))


def _num_rows(session: Session, within: Range) -> int:
    """Return how many rows a place has; of a large one about how many, because ids of forgotten rows are not used
    again. Counting all of a large place would take too long."""
    counted = session.execute(_COUNT_SOME, within).scalar_one()
    if counted < MAX_COUNTED:
        return counted
    return session.execute(_LAST_ID, within).scalar_one() - within["first"] + 1


def _weight(count: int, num_rows: int) -> float:
    """Return what a word is worth that so many rows of a place have, as BM25 has it. Among a handful of rows nothing is
    rare, so they count as if they stood among more."""
    num_rows = max(num_rows, FEWEST_ROWS)
    return math.log(1 + max(0.0, num_rows - count + 0.5) / (count + 0.5))


def _weigh_rare(counts: dict[str, int], num_rows: int) -> dict[str, float]:
    """Return what each of the rarest words is worth: by how few rows of the place have it."""
    rare = sorted((count, term) for term, count in counts.items() if 0 < count < MAX_ROWS)[:MAX_TELLING]
    return {term: _weight(count, num_rows) for count, term in rare}


def _weigh_common(counts: dict[str, int], _num_rows: int) -> dict[str, float]:
    """Return the common words, each worth as little."""
    return dict.fromkeys([term for term, count in counts.items() if count == MAX_ROWS][:MAX_TELLING], 1.0)


def _rank(
    session: Session, weights: dict[str, float], within: Range, num: int, exclude_task: str | None
) -> list[tuple[tuple[float, int], str]]:
    """Return (what to sort by, row id) of the best rows of one place: by the worth of the words they have."""
    if not weights:
        return []
    each = f"SELECT * FROM (SELECT rowid AS id, ? AS weight FROM words WHERE {_WITHIN} LIMIT {MAX_ROWS})"
    best = f"SELECT id, sum(weight) AS score FROM ({' UNION ALL '.join([each] * len(weights))}) GROUP BY id"
    values: list[str | float | int] = []
    for term, weight in weights.items():
        values += [weight, term, within["first"], within["last"]]
    statement = (
        f"SELECT e.id, score, e.row_id FROM ({best} ORDER BY score DESC, id LIMIT ?) AS best "
        "JOIN word_entries e ON e.id = best.id WHERE e.task <> ? OR ? = '' ORDER BY score DESC, e.id LIMIT ?"
    )
    left_out = exclude_task or ""
    values += [-1 if left_out else num, left_out, left_out, num]
    found = session.connection().exec_driver_sql(statement, tuple(values))
    return [((-score, entry_id), row_id) for entry_id, score, row_id in found]


def _storable(value: str) -> str:
    return value.encode("utf-8", "replace").decode("utf-8").replace("\x00", " ")


_FORGET_WORDS = text(
    "DELETE FROM words WHERE rowid IN (SELECT id FROM word_entries WHERE collection = :collection AND row_id = :row_id)"
)
_FORGET_ENTRY = text("DELETE FROM word_entries WHERE collection = :collection AND row_id = :row_id")
_HOLD_ENTRY = text(
    "INSERT INTO word_entries (id, collection, row_id, task, digest) VALUES (:id, :collection, :row_id, :task, :digest)"
)
_HOLD_WORDS = text("INSERT INTO words (rowid, text) VALUES (:id, :text)")
_DIGESTS = text("SELECT row_id, digest FROM word_entries WHERE collection = :collection")
_COUNTS = text("SELECT collection, count(*) FROM word_entries GROUP BY collection")
_HAS_PLACES = text("SELECT 1 FROM pragma_table_info('word_places') WHERE name = 'user_id'")
_ADD_PLACE = text(
    "INSERT OR IGNORE INTO word_places (collection, tenant, user_id, environment, kind) "
    "VALUES (:collection, :tenant, :user_id, :environment, :kind)"
)
_PLACE_ID = text(
    "SELECT id FROM word_places WHERE collection = :collection AND tenant = :tenant AND user_id = :user_id "
    "AND environment = :environment AND kind = :kind"
)
_LAST_ID = text("SELECT max(id) FROM word_entries WHERE id BETWEEN :first AND :last")
_COUNT_SOME = text(
    f"SELECT count(*) FROM (SELECT 1 FROM word_entries WHERE id BETWEEN :first AND :last LIMIT {MAX_COUNTED})"
)
_WITHIN = "words MATCH ? AND rowid BETWEEN ? AND ?"
