"""Find rows by word: SQLite's FTS5, in the rows' own file, or in one beside the index of meanings.

This module refuses to know meanings, and never trusts a query: any text of a user's is safe, because every word of
it is quoted. It is an index: both tables are made anew from the rows whenever they are missing or damaged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from sqlalchemy import text
from sqlmodel import Session

from memory.database import Database
from memory.searchables import COLLECTIONS, Searchable

MAX_TERMS = 64
WORD = re.compile(r"\w+")
# Words so common that sharing them says nothing.
COMMON_WORDS = """
a an and are as at be but by do for from had has have how i if in is it its me my no not of on or our so that the their
them then there these they this to was we were what when where which who why will with you your
"""
COMMON = frozenset(COMMON_WORDS.split())
TABLES = (
    "CREATE TABLE IF NOT EXISTS word_entries (id INTEGER PRIMARY KEY, collection TEXT NOT NULL, "
    "row_id TEXT NOT NULL, tenant TEXT NOT NULL, environment TEXT NOT NULL, kind TEXT NOT NULL, "
    "task TEXT NOT NULL, digest TEXT NOT NULL, UNIQUE (collection, row_id))",
    "CREATE INDEX IF NOT EXISTS word_entries_by_tenant ON word_entries (collection, tenant, environment, kind)",
    "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(text, tokenize='porter unicode61 remove_diacritics 2')",
)
FILTERS = ("tenant", "environment", "kind")


class WordIndex:
    """The words of everything searchable. `word_entries` says what a line of `words` speaks of."""

    def __init__(self, database: Database) -> None:
        """`database`: where the index's tables are, SQLite in any case."""
        self._database = database

    def create(self, session: Session) -> None:
        """Make the tables where they are missing."""
        for statement in TABLES:
            session.execute(text(statement))

    def rebuild(self, session: Session, searchables: Mapping[str, Iterable[Searchable]]) -> None:
        """Drop both tables, whatever their state, and fill them again."""
        for table in ("words", "word_entries"):
            session.execute(text(f"DROP TABLE IF EXISTS {table}"))
        self.create(session)
        for collection, entries in searchables.items():
            self.replace(session, collection, (), entries)

    def replace(self, session: Session, collection: str, row_ids: Iterable[str], entries: Iterable[Searchable]) -> None:
        """Forget `row_ids`, then hold `entries`: idempotent."""
        for row_id in row_ids:
            place = {"collection": collection, "row_id": row_id}
            session.execute(_FORGET_WORDS, place)
            session.execute(_FORGET_ENTRY, place)
        for entry in entries:
            values = {"collection": collection, "row_id": entry.row_id, "digest": entry.digest}
            values |= {"environment": entry.environment, "kind": entry.kind, "task": entry.task}
            values |= {"tenant": entry.tenant}
            entry_id = session.execute(_HOLD_ENTRY, values).lastrowid
            session.execute(_HOLD_WORDS, {"id": entry_id, "text": _storable(entry.text)})

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
        clause, values = _clause(collection, where, None)
        return bool(self._database.fetch(text(f"SELECT 1 FROM word_entries e WHERE {clause} LIMIT 1"), values))

    def find(
        self, collection: str, query_text: str, where: Mapping[str, str], num: int, *, exclude_task: str | None = None
    ) -> list[str]:
        """Return the ids of rows that share words with the query, best first (BM25)."""
        query = quote_terms(query_text)
        if not query:
            return []
        clause, values = _clause(collection, where, exclude_task)
        statement = (
            "SELECT e.row_id FROM words JOIN word_entries e ON e.id = words.rowid "
            f"WHERE words MATCH :query AND {clause} ORDER BY bm25(words), e.id LIMIT :num"
        )
        with self._database.read() as session:
            return [row_id for (row_id,) in session.execute(text(statement), values | {"query": query, "num": num})]


def quote_terms(query_text: str) -> str:
    """Return an FTS5 query for any of the text's words: each one quoted, so that none can be an operator."""
    words = dict.fromkeys(word.casefold() for word in WORD.findall(_storable(query_text)))
    telling = [word for word in words if word not in COMMON]
    return " OR ".join(f'"{word}"' for word in telling[:MAX_TERMS])


def _clause(collection: str, where: Mapping[str, str], exclude_task: str | None) -> tuple[str, dict[str, str]]:
    unknown = where.keys() - set(FILTERS)
    if unknown:
        raise ValueError(f"cannot filter by {sorted(unknown)!r}: choose among {FILTERS!r}")
    conditions, values = ["e.collection = :collection"], {"collection": collection}
    for name, value in where.items():
        conditions.append(f"e.{name} = :{name}")
        values[name] = value
    if exclude_task:
        conditions.append("e.task <> :exclude_task")
        values["exclude_task"] = exclude_task
    return " AND ".join(conditions), values


def _storable(value: str) -> str:
    return value.encode("utf-8", "replace").decode("utf-8").replace("\x00", " ")


_FORGET_WORDS = text(
    "DELETE FROM words WHERE rowid IN (SELECT id FROM word_entries WHERE collection = :collection AND row_id = :row_id)"
)
_FORGET_ENTRY = text("DELETE FROM word_entries WHERE collection = :collection AND row_id = :row_id")
_HOLD_ENTRY = text(
    "INSERT INTO word_entries (collection, row_id, tenant, environment, kind, task, digest) "
    "VALUES (:collection, :row_id, :tenant, :environment, :kind, :task, :digest)"
)
_HOLD_WORDS = text("INSERT INTO words (rowid, text) VALUES (:id, :text)")
_DIGESTS = text("SELECT row_id, digest FROM word_entries WHERE collection = :collection")
_COUNTS = text("SELECT collection, count(*) FROM word_entries GROUP BY collection")
