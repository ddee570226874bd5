"""Search over both indexes: the vector index and the text index, asked at the same time and fused.

The vector index has a deadline; the text index always answers. Reciprocal rank fusion (Cormack, Clarke and Buettcher,
2009) joins the two rankings. Very common words would fill the result with irrelevant rows, so they are used only when
the vector index gives no answer.

Invariant: a failing index costs relevance, never an answer. Both indexes can be rebuilt from the rows at any time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from memory.config import MemoryConfig
from memory.errors import IndexDamaged, IndexUnavailable, StorageError
from memory.records.trajectories import Trajectories
from memory.search.encoder import MAX_QUERY_CHARS, Encoder, QueryEncoder
from memory.search.index_sync import IndexSync
from memory.search.indexed_rows import COLLECTIONS, IndexedRows, IndexQuery
from memory.search.relevance import Match, WordMatches, join_matches, select_word_only_rows
from memory.search.text_index import TextIndex
from memory.search.vector_index import MAX_COMPARED, VectorIndex
from memory.storage.database import Database
from memory.storage.histogram import Histogram

FUSION_CONSTANT = 60  # the k of reciprocal rank fusion, as in the paper
MAX_HANGING = 2  # unanswered searches after which Chroma is not asked any more
POOL = 50  # rows requested of each index by `match`, which needs both values of a row
NUM_WORD_MATCHES = 200  # rows whose shared words are looked up, so that most of the nearest rows are among them
POLL_SECONDS = 0.01
MAX_SMALL = 1_000  # rows of small partitions that one query compares, when it names no kind
MAX_OWN = 200  # newest rows of one person that are compared, besides older ones with rare words of the query

logger = logging.getLogger(__name__)

T = TypeVar("T")
Hits = list[tuple[str, float]]
"""(row id, score or similarity), best first."""


class MemoryIndex:
    """The index of insights, exemplars and passages."""

    def __init__(
        self,
        database: Database,
        text_index: TextIndex,
        trajectories: Trajectories,
        directory: Path,
        encoder: Encoder,
        config: MemoryConfig,
    ) -> None:
        self._config = config
        self._text_index = text_index
        self._vector_index = VectorIndex(directory, encoder.name)
        self._queries = QueryEncoder(encoder)
        self._sync = IndexSync(
            database, IndexedRows(trajectories), text_index, self._vector_index, encoder, self._queries
        )
        self._hanging: list[_VectorSearch] = []  # searches past their deadline
        self.num_without_vectors = 0
        """Number of queries since the start that were answered without the vector index."""
        # The keys are label values of a metric: dashboards know them by these names.
        self.seconds = {stage: Histogram() for stage in ("words", "encoding", "meanings")}
        text_index.write(text_index.create)

    def start(self) -> None:
        """Start the thread that loads the encoder and follows the rows."""
        self._sync.start()

    def close(self) -> None:
        """Stop the thread and close the vector index."""
        self._sync.stop()
        self._queries.close()
        self._vector_index.close()

    async def find(
        self,
        collection: str,
        query_text: str,
        where: Mapping[str, str] | None = None,
        num: int = 10,
        *,
        tenant: str = "",
        user_id: str = "",
        exclude_task: str | None = None,
        min_similarity: float = -1.0,
    ) -> Hits:
        """Return (row id, score) of up to `num` rows, best first: of the whole tenant's rows and this person's.

        `where` may name an environment and a kind. A failing index is never raised: without vectors the result is by
        word, and without the text index it may be empty. Raises: ValueError for an unknown collection or filter.
        """
        scope = {"tenant": tenant, "user_id": user_id, **(where or {})}
        query = _make_query(collection, query_text, scope, num, exclude_task)
        if not self._can_match(query):
            return []
        word_matches, nearest = await self._search_both(query, num_words=num)
        by_word = [match.row_id for match in word_matches.matches]
        if nearest is None and len(by_word) < num:
            common = await self._search_text(partial(self._text_index.find_by_common_words, query), [])
            by_word += [row_id for row_id in common if row_id not in by_word]
        by_similarity = [row_id for row_id, similarity in nearest or () if similarity >= min_similarity]
        return fuse(by_word, by_similarity)[:num]

    async def match(
        self,
        collection: str,
        query_text: str,
        where: Mapping[str, str] | None = None,
        num: int = POOL,
        *,
        tenant: str = "",
        user_id: str = "",
        exclude_task: str | None = None,
    ) -> tuple[list[Match], int]:
        """Return (matches, best first, with their similarity and shared words; approximate number of rows searched).

        Arguments and errors are those of `find`.
        """
        scope = {"tenant": tenant, "user_id": user_id, **(where or {})}
        query = _make_query(collection, query_text, scope, num, exclude_task)
        if not self._can_match(query):
            return [], 0
        word_matches, nearest = await self._search_both(query, num_words=max(num, NUM_WORD_MATCHES))
        similarities = None if nearest is None else dict(nearest)
        if similarities is not None:
            word_only = select_word_only_rows(word_matches.matches, similarities)
            similarities |= await self._compare(query, word_only)
        return join_matches(word_matches.matches, similarities, num), word_matches.num_rows

    async def rebuild(self, *, timeout_seconds: float = 3600.0) -> dict[str, int]:
        """Rebuild both indexes from the rows; return the number of rows of each collection."""
        future = asyncio.wrap_future(self._sync.request_rebuild())
        async with asyncio.timeout(timeout_seconds):
            await future
        await self.drain(timeout_seconds=timeout_seconds)
        return self.count()

    async def drain(self, *, timeout_seconds: float = 120.0) -> None:
        """Wait until the index is up to date. Raises: TimeoutError with the reason for the delay."""
        deadline = time.monotonic() + timeout_seconds
        while not self._sync.is_settled:
            if time.monotonic() > deadline:
                cause = self._sync.last_failure
                raise TimeoutError(
                    f"the index is not up to date after {timeout_seconds:g} s: {cause or 'still at work'}"
                )
            self._sync.wake()
            await asyncio.sleep(POLL_SECONDS)

    def count(self) -> dict[str, int]:
        """Return the number of searchable rows, by collection."""
        return self._text_index.count()

    @property
    def has_vectors(self) -> bool:
        """Whether queries use the vector index: the encoder is loaded, and Chroma is open and responds."""
        self._hanging = [search for search in self._hanging if not search.is_done]
        return self._queries.is_ready and self._vector_index.is_open and len(self._hanging) < MAX_HANGING

    def _can_match(self, query: IndexQuery) -> bool:
        """Return whether a search could have any result. Raises: ValueError for an unknown filter."""
        if not query.text.strip():
            return False
        try:
            return self._text_index.has_any(query.collection, query.where)
        except StorageError:  # unknown: the vector index may still have a match
            return True

    async def _search_both(self, query: IndexQuery, *, num_words: int) -> tuple[WordMatches, Hits | None]:
        """Search both indexes at once: `num_words` rows by word, `query.num` rows by vector.

        The second result is None when the vector index gives no answer.
        """
        match = partial(self._text_index.match, replace(query, num=num_words))
        # a task, because it is awaited twice: here and in _rows_to_compare
        text_search = asyncio.ensure_future(self._search_text(match, WordMatches([], 0)))
        return await asyncio.gather(text_search, self._search_vectors(query, text_search))

    async def _search_text(self, search: Callable[[], T], fallback: T) -> T:
        try:
            with self.seconds["words"].measure():
                return await asyncio.to_thread(search)  # no deadline: a thread cannot be cancelled, and SQLite is quick
        except StorageError as error:
            logger.warning("the text index failed, rebuild it: %s", error)
            return fallback

    async def _search_vectors(self, query: IndexQuery, text_search: Awaitable[WordMatches]) -> Hits | None:
        """Search Chroma within the deadlines; None when it gives no answer."""
        try:
            if not self.has_vectors:
                raise IndexUnavailable("the encoder or the vector index is not ready")
            with self.seconds["encoding"].measure():
                async with asyncio.timeout(self._config.encoding_deadline_seconds):
                    vector = await self._queries.encode(query.text)
            compared = await self._rows_to_compare(query, text_search)
            search = _VectorSearch(lambda: self._vector_index.find(query, vector, compared=compared))
            with self.seconds["meanings"].measure():
                return await self._result_of(search)
        except IndexDamaged:
            self._sync.request_check()
        except (IndexUnavailable, TimeoutError) as error:
            logger.info("this query is answered without vectors: %s", error or "past the deadline")
        self.num_without_vectors += 1
        return None

    async def _rows_to_compare(self, query: IndexQuery, text_search: Awaitable[WordMatches]) -> list[str]:
        """Return the ids of the rows that no search of Chroma reaches: one person's rows and small partitions."""
        row_ids: list[str] = []
        if query.names_person:
            # Of one person's rows, the newest are compared, and those that share rare words with the query.
            row_ids += [match.row_id for match in (await text_search).matches[: query.num]]
        try:
            if query.names_person:
                row_ids += self._text_index.newest_of_person(query, MAX_OWN)
            row_ids += self._small_partitions(query)
        except StorageError as error:
            logger.warning("the text index failed, rebuild it: %s", error)
        return list(dict.fromkeys(row_ids))

    def _small_partitions(self, query: IndexQuery) -> list[str]:
        """Return the ids of the whole tenant's rows in partitions that are compared row by row."""
        row_ids: list[str] = []
        for partition in self._text_index.tenant_partitions(query):
            if len(row_ids) < MAX_SMALL and not self._vector_index.is_large(query.collection, partition):
                row_ids += self._text_index.newest_of_partition(
                    query.collection, partition, MAX_COMPARED, exclude_task=query.exclude_task
                )
        return row_ids

    async def _compare(self, query: IndexQuery, row_ids: list[str]) -> dict[str, float]:
        """Return the similarity of rows that were found by word alone, by row id.

        Empty when it is not known in time: such a row is rarely the best.
        """
        if not row_ids:
            return {}
        try:
            async with asyncio.timeout(self._config.encoding_deadline_seconds):
                vector = await self._queries.encode(query.text)  # cached by the first search
            search = _VectorSearch(lambda: self._vector_index.compare(query, vector, row_ids))
            with self.seconds["meanings"].measure():
                return dict(await self._result_of(search))
        except IndexDamaged:
            self._sync.request_check()
        except (IndexUnavailable, TimeoutError) as error:
            logger.info("rows found by word alone are left out: %s", error or "past the deadline")
        return {}

    async def _result_of(self, search: _VectorSearch) -> Hits:
        """Wait for Chroma until the deadline. Raises: IndexDamaged, TimeoutError."""
        try:
            async with asyncio.timeout(self._config.retrieval_deadline_seconds):
                # the timeout cancels the future, not the thread, which goes on inside Chroma
                return await asyncio.wrap_future(search.result)
        except TimeoutError:
            self._hanging.append(search)
            raise


def _make_query(
    collection: str, query_text: str, where: Mapping[str, str], num: int, exclude_task: str | None
) -> IndexQuery:
    """Return a query of bounded length. Raises: ValueError for an unknown collection."""
    if collection not in COLLECTIONS:
        raise ValueError(f"no collection is called {collection!r}: choose among {COLLECTIONS!r}")
    return IndexQuery(collection, query_text[:MAX_QUERY_CHARS], where, num, exclude_task)


class _VectorSearch:
    """A search of Chroma on a thread of its own: one that hangs delays neither others nor the process's exit."""

    def __init__(self, search: Callable[[], Hits]) -> None:
        self._search = search
        self.result: Future[Hits] = Future()
        self._thread = threading.Thread(target=self._run, name="ratchet-vector-search", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            # every failure of Chroma is IndexDamaged (vector_index.py); an error of another type would leave the future
            # open until the deadline
            hits = self._search()
        except IndexDamaged as error:
            if self.result.set_running_or_notify_cancel():
                self.result.set_exception(error)
        else:
            if self.result.set_running_or_notify_cancel():  # False: the waiting task has given up
                self.result.set_result(hits)


def fuse(*rankings: list[str]) -> Hits:
    """Return (row id, score) of all ranked rows, best first: the sum of 1 / (60 + rank) over the rankings."""
    scores: dict[str, float] = defaultdict(float)
    for ranking in rankings:
        for rank, row_id in enumerate(ranking, start=1):
            scores[row_id] += 1.0 / (FUSION_CONSTANT + rank)
    # stable: of equal scores, the row of the first ranking comes first
    return sorted(scores.items(), key=lambda scored: -scored[1])
