"""Full-text search with SQLite's FTS5, in the rows' own database file or in one beside the vector index.

Every word of a query is quoted, so that no user's text can be an FTS5 operator. The tables are built from the rows
again whenever they are missing or damaged.

The rows of one partition (tenant, person, environment and kind of a collection) have ids in a range of their own, so
that FTS5 searches for a word in that range only. Rows are ranked by the rarity of the shared words within the
partition, as BM25 does. FTS5's own `bm25` is not used: it reads every row, of all tenants, that has any of the words,
which takes a second among a million rows.

Invariant: a query reads at most `MAX_ROWS` rows for each of its words, whatever the size of the index.
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
from memory.search.indexed_rows import COLLECTIONS, PARTITION_COLUMNS, IndexedRow, IndexPartition, IndexQuery
from memory.search.relevance import FEWEST_ROWS, MOST_ROWS, WordMatch, WordMatches
from memory.storage.database import Database

WRITE_BATCH = 1000
MAX_TERMS = 32
MAX_ROWS = 200  # a word that more rows of a partition contain says little there
MAX_COUNTED = MOST_ROWS  # rows of a partition that are counted exactly; the floor of relevance rises no further
MAX_RANKING_TERMS = 12  # words of a query that rank
PARTITION_BITS = 32  # low bits of an id number the rows of a partition; the other 31 bits number the partitions
WORD = re.compile(r"\w+")
STOP_WORDS = """
a an and are as at be but by do for from had has have how i if in is it its me my no not of on or our so that the their
them then there these they this to was we were what when where which who why will with you your
"""
STOP_TERMS = frozenset(STOP_WORDS.split())
# The tables' names are part of the database file: `word_places` holds the partitions.
TABLES = (
    "CREATE TABLE IF NOT EXISTS word_places (id INTEGER PRIMARY KEY, collection TEXT NOT NULL, tenant TEXT NOT NULL, "
    "user_id TEXT NOT NULL, environment TEXT NOT NULL, kind TEXT NOT NULL, "
    "UNIQUE (collection, tenant, user_id, environment, kind))",
    "CREATE TABLE IF NOT EXISTS word_entries (id INTEGER PRIMARY KEY, collection TEXT NOT NULL, "
    "row_id TEXT NOT NULL, task TEXT NOT NULL, digest TEXT NOT NULL, UNIQUE (collection, row_id))",
    "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(text, tokenize='porter unicode61 remove_diacritics 2')",
)
TABLE_NAMES = ("words", "word_entries", "word_places")
IdRange = dict[str, int]
"""The first and the last possible id of a partition, as `first` and `last`."""
Weigh = Callable[[dict[str, int], int], dict[str, float]]
"""(number of rows that contain each word, number of rows of the partition) -> weight of each word that ranks."""


class TextIndex:
    """The words of every searchable row. `word_entries` maps each line of `words` to its row."""

    def __init__(self, database: Database) -> None:
        """`database` holds the index's tables: always SQLite, even when the rows are in PostgreSQL."""
        self._database = database

    def create(self, session: Session) -> None:
        """Create the tables where they are missing, or where their layout precedes partitions by person."""
        if not session.execute(_HAS_PERSONS).first():
            self._drop(session)
        for statement in TABLES:
            session.execute(text(statement))

    def rebuild(self, session: Session, rows: Mapping[str, Iterable[IndexedRow]]) -> None:
        """Drop the tables, whatever their state, and fill them again with `rows` by collection."""
        self._drop(session)
        self.create(session)
        for collection, indexed_rows in rows.items():
            rest = iter(indexed_rows)
            while batch := list(islice(rest, WRITE_BATCH)):
                self.replace(session, collection, (), batch)

    def replace(self, session: Session, collection: str, row_ids: Iterable[str], rows: Iterable[IndexedRow]) -> None:
        """Forget `row_ids`, then store `rows`. Idempotent."""
        forgotten = [{"collection": collection, "row_id": row_id} for row_id in row_ids]
        if forgotten:
            # order: the words are found through the entries, which the second statement deletes
            session.execute(_DELETE_WORDS, forgotten)
            session.execute(_DELETE_ENTRY, forgotten)
        next_ids: dict[IndexPartition, int] = {}
        entries, texts = [], []
        for row in rows:
            entry_id = next_ids.get(row.partition) or _next_id(session, collection, row.partition)
            next_ids[row.partition] = entry_id + 1
            values = {"id": entry_id, "collection": collection, "row_id": row.row_id}
            entries.append(values | {"task": row.task, "digest": row.digest})
            texts.append({"id": entry_id, "text": _storable(row.text)})
        if entries:
            session.execute(_INSERT_ENTRY, entries)
            session.execute(_INSERT_WORDS, texts)

    def write(self, work: Callable[[Session], None]) -> None:
        """Run `work`, which may call the methods that take a session, in a transaction of the index. Blocks."""
        self._database.write_sync(work)

    def digests(self, collection: str) -> dict[str, str]:
        """Return the digest of each row that the index holds of a collection, by row id."""
        with self._database.read() as session:
            return {row_id: digest for row_id, digest in session.execute(_DIGESTS, {"collection": collection})}

    def count(self) -> dict[str, int]:
        """Return the number of rows that the index holds, by collection."""
        with self._database.read() as session:
            counts = {collection: num for collection, num in session.execute(_COUNTS)}
        return {collection: counts.get(collection, 0) for collection in COLLECTIONS}

    def has_any(self, collection: str, where: Mapping[str, str]) -> bool:
        """Return whether the filter matches any row at all. Raises: ValueError for an unknown filter."""
        ((has_any,),) = self._database.fetch(_exists_statement(tuple(where)), {"collection": collection, **where})
        return bool(has_any)

    def newest_of_person(self, query: IndexQuery, num: int) -> list[str]:
        """Return the ids of the newest `num` rows of the person whom the filter names."""
        values = {"collection": query.collection, "num": num, "exclude_task": query.exclude_task or "", **query.where}
        return [row_id for (row_id,) in self._database.fetch(_newest_statement(tuple(query.where)), values)]

    def tenant_partitions(self, query: IndexQuery) -> list[tuple[str, str, str]]:
        """Return (tenant, environment, kind) of the partitions for the whole tenant that the filter matches."""
        values = {"collection": query.collection, **query.where, "user_id": EVERYBODY}
        return [tuple(row) for row in self._database.fetch(_partitions_statement(tuple(values)[1:]), values)]

    def newest_of_partition(
        self, collection: str, partition: Sequence[str], num: int, *, exclude_task: str | None = None
    ) -> list[str]:
        """Return the ids of the newest `num` rows of (tenant, environment, kind), without any person's own rows."""
        where = dict(zip(("tenant", "environment", "kind"), partition, strict=True)) | {"user_id": EVERYBODY}
        return self.newest_of_person(IndexQuery(collection, "", where, exclude_task=exclude_task), num)

    def find(self, query: IndexQuery) -> list[str]:
        """Return the ids of rows that share rare words with the query, best first: those that share the rarest."""
        return [match.row_id for match in self.match(query).matches]

    def match(self, query: IndexQuery) -> WordMatches:
        """Return the rows of `find`, each with how much of the query it repeats."""
        return self._find(query, _weigh_rare)

    def find_by_common_words(self, query: IndexQuery) -> list[str]:
        """Return the ids of rows that share words which `MAX_ROWS` other rows contain too: a last resort."""
        return [match.row_id for match in self._find(query, _weigh_common).matches]

    def _find(self, query: IndexQuery, weigh: Weigh) -> WordMatches:
        terms = quote_terms(query.text)
        hits: list[tuple[tuple[float, int], WordMatch]] = []
        num_rows_searched = 0
        with self._database.read() as session:
            for ids in _id_ranges(session, query.collection, query.where):
                num_rows = _num_rows(session, ids)
                num_rows_searched += num_rows
                counts = _count(session, terms, ids) if terms else {}
                weights = weigh(counts, num_rows)
                max_weight = _weight(0, num_rows)  # of a word that no row has
                total_weight = sum(weights.values()) + max_weight * sum(count == 0 for count in counts.values())
                for order, row_id in _rank(session, weights, ids, query.num, query.exclude_task):
                    # order is (-score, id)
                    # a word that no row has counts in the total, or a query of unknown words and one known word would
                    # be covered in full
                    hits.append((order, WordMatch(row_id, -order[0] / total_weight, -order[0] / max_weight)))
        # Each partition returned its best rows; their scores are comparable, their ids break ties.
        best = heapq.nsmallest(query.num, hits, key=lambda hit: hit[0])
        return WordMatches([match for _, match in best], num_rows_searched)

    def _drop(self, session: Session) -> None:
        for table in TABLE_NAMES:
            session.execute(text(f"DROP TABLE IF EXISTS {table}"))


def quote_terms(query_text: str) -> list[str]:
    """Return the text's words for FTS5, stop words left out, each one quoted so that none can be an operator."""
    words = dict.fromkeys(word.casefold() for word in WORD.findall(_storable(query_text)))
    return [f'"{word}"' for word in words if word not in STOP_TERMS][:MAX_TERMS]


@cache
def _exists_statement(columns: tuple[str, ...]) -> TextClause:
    """Select whether the partitions that a filter on these columns matches hold any row."""
    return text(
        f"SELECT EXISTS (SELECT 1 FROM word_places place WHERE {_condition(columns)} AND EXISTS "
        f"(SELECT 1 FROM word_entries WHERE id BETWEEN place.id << {PARTITION_BITS} "
        f"AND ((place.id + 1) << {PARTITION_BITS}) - 1))"
    )


@cache
def _partitions_statement(columns: tuple[str, ...]) -> TextClause:
    """Select the partitions for the whole tenant; the filter's `user_id` is `EVERYBODY`."""
    return text(f"SELECT DISTINCT tenant, environment, kind FROM word_places WHERE {_condition(columns)}")


@cache
def _newest_statement(columns: tuple[str, ...]) -> TextClause:
    return text(
        f"SELECT e.row_id FROM word_places place JOIN word_entries e ON e.id BETWEEN place.id << {PARTITION_BITS} AND "
        f"((place.id + 1) << {PARTITION_BITS}) - 1 WHERE {_condition(columns, alias='place.')} "
        "AND place.user_id = :user_id AND (e.task <> :exclude_task OR :exclude_task = '') "
        "ORDER BY e.id DESC LIMIT :num"
    )


def _condition(columns: Iterable[str], *, alias: str = "") -> str:
    """Return the SQL condition of a filter on these columns; one on `user_id` also matches the whole tenant's rows.

    Raises: ValueError for an unknown column.
    """
    unknown = set(columns) - set(PARTITION_COLUMNS)
    if unknown:
        raise ValueError(f"cannot filter by {sorted(unknown)!r}: choose among {PARTITION_COLUMNS!r}")
    conditions = {name: f"{alias}{name} = :{name}" for name in columns}
    if "user_id" in conditions:
        conditions["user_id"] = f"{alias}user_id IN ('{EVERYBODY}', :user_id)"
    return " AND ".join([f"{alias}collection = :collection", *conditions.values()])


def _id_ranges(session: Session, collection: str, where: Mapping[str, str]) -> list[IdRange]:
    """Return the id range of every partition that a filter matches. Raises: ValueError for an unknown filter."""
    query = text(f"SELECT id FROM word_places WHERE {_condition(where)}")
    partition_ids = session.execute(query, {"collection": collection, **where})
    return [_id_range(partition_id) for (partition_id,) in partition_ids]


def _id_range(partition_id: int) -> IdRange:
    return {"first": partition_id << PARTITION_BITS, "last": ((partition_id + 1) << PARTITION_BITS) - 1}


def _next_id(session: Session, collection: str, partition: IndexPartition) -> int:
    values = {"collection": collection} | dict(zip(PARTITION_COLUMNS, partition, strict=True))
    session.execute(_INSERT_PARTITION, values)  # ignored where the partition exists
    ids = _id_range(session.execute(_PARTITION_ID, values).scalar_one())
    last = session.execute(_LAST_ID, ids).scalar_one()
    return ids["first"] if last is None else last + 1


def _count(session: Session, terms: list[str], ids: IdRange) -> dict[str, int]:
    """Return the number of rows of one partition that contain each word, counted up to `MAX_ROWS`."""
    counted = f"(SELECT count(*) FROM (SELECT rowid FROM words WHERE {_IN_RANGE} LIMIT {MAX_ROWS}))"
    values = [value for term in terms for value in (term, ids["first"], ids["last"])]
    counts = session.connection().exec_driver_sql(f"SELECT {', '.join([counted] * len(terms))}", tuple(values)).one()
    return dict(zip(terms, counts, strict=True))


def _num_rows(session: Session, ids: IdRange) -> int:
    """Return the number of rows of a partition, exact up to `MAX_COUNTED`.

    A larger partition is estimated from its last id, because counting it would take too long. The estimate is high
    after deletions: the ids of forgotten rows are not used again.
    """
    counted = session.execute(_COUNT_SOME, ids).scalar_one()
    if counted < MAX_COUNTED:
        return counted
    return session.execute(_LAST_ID, ids).scalar_one() - ids["first"] + 1


def _weight(count: int, num_rows: int) -> float:
    """Return BM25's inverse document frequency of a word that `count` of `num_rows` rows contain.

    A departure from BM25: a partition counts as `FEWEST_ROWS` rows at least, because no word is rare among a few rows.
    """
    num_rows = max(num_rows, FEWEST_ROWS)
    return math.log(1 + max(0.0, num_rows - count + 0.5) / (count + 0.5))


def _weigh_rare(counts: dict[str, int], num_rows: int) -> dict[str, float]:
    """Return the weights of the rarest words that any row contains."""
    rare = sorted((count, term) for term, count in counts.items() if 0 < count < MAX_ROWS)[:MAX_RANKING_TERMS]
    return {term: _weight(count, num_rows) for count, term in rare}


def _weigh_common(counts: dict[str, int], _num_rows: int) -> dict[str, float]:
    """Return the same weight for every common word."""
    return dict.fromkeys([term for term, count in counts.items() if count == MAX_ROWS][:MAX_RANKING_TERMS], 1.0)


def _rank(
    session: Session, weights: dict[str, float], ids: IdRange, num: int, exclude_task: str | None
) -> list[tuple[tuple[float, int], str]]:
    """Return ((-score, entry id), row id) of the best rows of one partition; the score sums the words' weights."""
    if not weights:
        return []
    each = f"SELECT * FROM (SELECT rowid AS id, ? AS weight FROM words WHERE {_IN_RANGE} LIMIT {MAX_ROWS})"
    best = f"SELECT id, sum(weight) AS score FROM ({' UNION ALL '.join([each] * len(weights))}) GROUP BY id"
    values: list[str | float | int] = []
    for term, weight in weights.items():
        values += [weight, term, ids["first"], ids["last"]]
    statement = (
        f"SELECT e.id, score, e.row_id FROM ({best} ORDER BY score DESC, id LIMIT ?) AS best "
        "JOIN word_entries e ON e.id = best.id WHERE e.task <> ? OR ? = '' ORDER BY score DESC, e.id LIMIT ?"
    )
    excluded = exclude_task or ""
    values += [-1 if excluded else num, excluded, excluded, num]  # LIMIT -1 is no limit in SQLite
    hits = session.connection().exec_driver_sql(statement, tuple(values))
    return [((-score, entry_id), row_id) for entry_id, score, row_id in hits]


def _storable(value: str) -> str:
    return value.encode("utf-8", "replace").decode("utf-8").replace("\x00", " ")


_DELETE_WORDS = text(
    "DELETE FROM words WHERE rowid IN (SELECT id FROM word_entries WHERE collection = :collection AND row_id = :row_id)"
)
_DELETE_ENTRY = text("DELETE FROM word_entries WHERE collection = :collection AND row_id = :row_id")
_INSERT_ENTRY = text(
    "INSERT INTO word_entries (id, collection, row_id, task, digest) VALUES (:id, :collection, :row_id, :task, :digest)"
)
_INSERT_WORDS = text("INSERT INTO words (rowid, text) VALUES (:id, :text)")
_DIGESTS = text("SELECT row_id, digest FROM word_entries WHERE collection = :collection")
_COUNTS = text("SELECT collection, count(*) FROM word_entries GROUP BY collection")
_HAS_PERSONS = text("SELECT 1 FROM pragma_table_info('word_places') WHERE name = 'user_id'")
_INSERT_PARTITION = text(
    "INSERT OR IGNORE INTO word_places (collection, tenant, user_id, environment, kind) "
    "VALUES (:collection, :tenant, :user_id, :environment, :kind)"
)
_PARTITION_ID = text(
    "SELECT id FROM word_places WHERE collection = :collection AND tenant = :tenant AND user_id = :user_id "
    "AND environment = :environment AND kind = :kind"
)
_LAST_ID = text("SELECT max(id) FROM word_entries WHERE id BETWEEN :first AND :last")
_COUNT_SOME = text(
    f"SELECT count(*) FROM (SELECT 1 FROM word_entries WHERE id BETWEEN :first AND :last LIMIT {MAX_COUNTED})"
)
_IN_RANGE = "words MATCH ? AND rowid BETWEEN ? AND ?"
