"""Find rows by meaning and by word, fused; the one way to ask the index.

This module refuses to know what is done with what it finds. A question goes to both indexes at once; meanings have
a deadline, words answer in any case, and reciprocal rank fusion joins the two lists. Words that too many rows have
would fill half of the answer with rows of no account: they are asked only where meanings can't be had.

Invariant: a failure of the index costs relevance, never an answer; nothing here is truth, and all of it can be rebuilt.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from memory.config import MemoryConfig
from memory.errors import IndexDamaged, IndexUnavailable, StorageError
from memory.records.trajectories import Trajectories
from memory.scopes import EVERYBODY
from memory.search.encoder import Encoder, QueryEncoder
from memory.search.index_sync import IndexSync
from memory.search.indexed_rows import COLLECTIONS, IndexedRows
from memory.search.relevance import Match, WordMatches, choose_found_by_word, join_matches
from memory.search.text_index import TextIndex
from memory.search.vector_index import MAX_COMPARED, VectorIndex
from memory.storage.database import Database
from memory.storage.histogram import Tally

FUSION_CONSTANT = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009)
MAX_HANGING = 2  # questions that Chroma may leave unanswered before it isn't asked any more
POOL = 50  # rows that each index is asked for, where both have to be known of a row
NUM_WORD_MATCHES = 200  # rows whose shared words are looked up, so that most of the nearest rows are among them
POLL_SECONDS = 0.01
MAX_SMALL = 1_000  # rows of small partitions that one question may have compared, where it names no kind
MAX_OWN = 200  # rows of one person whose vectors are compared, the newest; beside them, older ones with rare words

logger = logging.getLogger(__name__)

T = TypeVar("T")


class MemoryIndex:
    """Everything searchable, by meaning and by word."""

    def __init__(
        self,
        database: Database,
        words: TextIndex,
        trajectories: Trajectories,
        directory: Path,
        encoder: Encoder,
        config: MemoryConfig,
    ) -> None:
        self._config = config
        self._words = words
        self._meanings = VectorIndex(directory, encoder.name)
        self._queries = QueryEncoder(encoder)
        self._follower = IndexSync(
            database, IndexedRows(trajectories), self._words, self._meanings, encoder, self._queries
        )
        self._hanging: list[_Question] = []
        self.num_without_meanings = 0
        """Questions that were answered by words alone since the start."""
        self.seconds = {stage: Tally() for stage in ("words", "encoding", "meanings")}
        words.write(words.create)

    def start(self) -> None:
        """Begin to follow the rows, and to load the encoder, in a thread."""
        self._follower.start()

    def close(self) -> None:
        self._follower.stop()
        self._queries.close()
        self._meanings.close()

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
    ) -> list[tuple[str, float]]:
        """Return (row id, score) of what fits the query, best first: what all of one tenant are shown, and what this
        person is. `where` may name an environment and a kind.

        Never fails for the index's sake: without meanings it finds by word, without words nothing. Raises:
        ValueError for a collection or a filter that doesn't exist.
        """
        where = {"tenant": tenant, "user_id": user_id, **(where or {})}
        if not await self._is_worth_asking(collection, query_text, where):
            return []
        words, near = await self._ask_both(collection, query_text, where, num, exclude_task)
        by_word = [match.row_id for match in words.matches]
        if near is None and len(by_word) < num:
            find = partial(
                self._words.find_by_common_words, collection, query_text, where, num, exclude_task=exclude_task
            )
            by_word += [row_id for row_id in await self._find_by_word(find, []) if row_id not in by_word]
        by_meaning = [row_id for row_id, similarity in near or () if similarity >= min_similarity]
        return fuse(by_word, by_meaning)[:num]

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
        """Return what either index finds, best first, with what shows how relevant it is; and among how many rows it
        was found, about. The other arguments and errors are those of `find`."""
        where = {"tenant": tenant, "user_id": user_id, **(where or {})}
        if not await self._is_worth_asking(collection, query_text, where):
            return [], 0
        words, near = await self._ask_both(
            collection, query_text, where, num, exclude_task, num_words=max(num, NUM_WORD_MATCHES)
        )
        similarities = None if near is None else dict(near)
        if similarities is not None:
            others = choose_found_by_word(words.matches, similarities)
            similarities |= await self._compare(collection, query_text, where, others)
        return join_matches(words.matches, similarities, num), words.num_rows

    async def rebuild(self, *, timeout_seconds: float = 3600.0) -> dict[str, int]:
        """Make both indexes anew from the rows; return how many rows of each collection they hold."""
        future = asyncio.wrap_future(self._follower.request_rebuild())
        async with asyncio.timeout(timeout_seconds):
            await future
        await self.drain(timeout_seconds=timeout_seconds)
        return self.count()

    async def drain(self, *, timeout_seconds: float = 120.0) -> None:
        """Wait until the index holds what the rows say. Raises: TimeoutError, telling what keeps it."""
        deadline = time.monotonic() + timeout_seconds
        while not self._follower.is_settled:
            if time.monotonic() > deadline:
                cause = self._follower.last_failure
                raise TimeoutError(
                    f"the index is not up to date after {timeout_seconds:g} s: {cause or 'still at work'}"
                )
            self._follower.wake()
            await asyncio.sleep(POLL_SECONDS)

    def count(self) -> dict[str, int]:
        """Return how many rows of each collection can be found."""
        return self._words.count()

    @property
    def has_meanings(self) -> bool:
        """Whether questions are answered by meaning: the encoder is loaded and Chroma is open."""
        self._hanging = [question for question in self._hanging if not question.is_answered]
        return self._queries.is_ready and self._meanings.is_open and len(self._hanging) < MAX_HANGING

    async def _has_any(self, collection: str, where: dict[str, str]) -> bool:
        try:
            return self._words.has_any(collection, where)
        except StorageError:
            return True

    async def _is_worth_asking(self, collection: str, query_text: str, where: dict[str, str]) -> bool:
        if collection not in COLLECTIONS:
            raise ValueError(f"no collection is called {collection!r}: choose among {COLLECTIONS!r}")
        return bool(query_text.strip()) and await self._has_any(collection, where)

    async def _ask_both(
        self,
        collection: str,
        query_text: str,
        where: dict[str, str],
        num: int,
        exclude_task: str | None,
        *,
        num_words: int | None = None,
    ) -> tuple[WordMatches, list[tuple[str, float]] | None]:
        """Ask both indexes at once, for `num_words` rows by word and `num` by meaning; None where meanings can't be
        had."""
        match = partial(self._words.match, collection, query_text, where, num_words or num, exclude_task)
        asking = asyncio.ensure_future(self._find_by_word(match, WordMatches([], 0)))
        return await asyncio.gather(
            asking, self._find_by_meaning(collection, query_text, where, num, exclude_task, asking)
        )

    async def _find_by_word(self, find: Callable[[], T], otherwise: T) -> T:
        try:
            with self.seconds["words"].measure():
                return await asyncio.to_thread(find)
        except StorageError as error:
            logger.warning("the word index failed, rebuild it: %s", error)
            return otherwise

    async def _find_by_meaning(
        self,
        collection: str,
        query_text: str,
        where: dict[str, str],
        num: int,
        exclude_task: str | None,
        by_word: Awaitable[WordMatches],
    ) -> list[tuple[str, float]] | None:
        """Ask Chroma within the deadline; None when it can't say."""
        try:
            if not self.has_meanings:
                raise IndexUnavailable("the encoder or the index is not ready")
            with self.seconds["encoding"].measure():
                async with asyncio.timeout(self._config.encoding_deadline_seconds):
                    vector = await self._queries.encode(query_text)
            # One person's rows are compared one by one: the newest, and those with rare words of the query.
            words_own = [] if where["user_id"] == EVERYBODY else [it.row_id for it in (await by_word).matches[:num]]
            compared = [*words_own, *self._newest_own(collection, where, exclude_task)]
            compared += self._of_small_partitions(collection, where, exclude_task)
            question = _Question(
                lambda: self._meanings.find(
                    collection,
                    vector,
                    where,
                    num,
                    compared=list(dict.fromkeys(compared)),
                    exclude_task=exclude_task,
                )
            )
            with self.seconds["meanings"].measure():
                return await self._answer(question)
        except IndexDamaged:
            self._follower.suspect()
        except (IndexUnavailable, TimeoutError) as error:
            logger.info("no meanings for this question: %s", error or "past the deadline")
        self.num_without_meanings += 1
        return None

    async def _compare(
        self, collection: str, query_text: str, where: dict[str, str], row_ids: list[str]
    ) -> dict[str, float]:
        """Return the similarity of question and rows that were found by word alone; nothing where it can't be had in
        time, because such a row is rarely the best."""
        if not row_ids:
            return {}
        try:
            async with asyncio.timeout(self._config.encoding_deadline_seconds):
                vector = await self._queries.encode(query_text)  # kept: it was encoded to find the nearest
            question = _Question(lambda: self._meanings.compare(collection, vector, where, row_ids))
            with self.seconds["meanings"].measure():
                return dict(await self._answer(question))
        except IndexDamaged:
            self._follower.suspect()
        except (IndexUnavailable, TimeoutError) as error:
            logger.info("rows found by word alone are left out: %s", error or "past the deadline")
        return {}

    def _newest_own(self, collection: str, where: dict[str, str], exclude_task: str | None) -> list[str]:
        """Return the ids of the newest of what this person alone is shown."""
        if where["user_id"] == EVERYBODY:
            return []
        try:
            return self._words.newest(collection, where, MAX_OWN, exclude_task=exclude_task)
        except StorageError as error:
            logger.warning("the word index failed, rebuild it: %s", error)
            return []

    def _of_small_partitions(self, collection: str, where: dict[str, str], exclude_task: str | None) -> list[str]:
        """Return the ids of what all are shown, of the partitions that are compared row by row."""
        try:
            found: list[str] = []
            for partition in self._words.partitions(collection, where):
                if len(found) < MAX_SMALL and not self._meanings.is_large(collection, partition):
                    found += self._words.ids_at(collection, partition, MAX_COMPARED, exclude_task=exclude_task or "")
            return found
        except StorageError as error:
            logger.warning("the word index failed, rebuild it: %s", error)
            return []

    async def _answer(self, question: _Question) -> list[tuple[str, float]]:
        """Wait for Chroma until the deadline. Raises: IndexDamaged, TimeoutError."""
        try:
            async with asyncio.timeout(self._config.retrieval_deadline_seconds):
                return await asyncio.wrap_future(question.answer)
        except TimeoutError:
            self._hanging.append(question)
            raise


class _Question:
    """A question to Chroma, asked on a thread of its own: one that hangs must hold up neither others nor the exit."""

    def __init__(self, ask: Callable[[], list[tuple[str, float]]]) -> None:
        self._ask = ask
        self.answer: Future[list[tuple[str, float]]] = Future()
        self._thread = threading.Thread(target=self._run, name="ratchet-question", daemon=True)
        self._thread.start()

    @property
    def is_answered(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            found = self._ask()
        except IndexDamaged as error:
            if self.answer.set_running_or_notify_cancel():
                self.answer.set_exception(error)
        else:
            if self.answer.set_running_or_notify_cancel():
                self.answer.set_result(found)


def fuse(*rankings: list[str]) -> list[tuple[str, float]]:
    """Return (id, score) of all that is ranked, best first: the sum of 1 / (60 + rank) over the rankings."""
    scores: dict[str, float] = defaultdict(float)
    for ranking in rankings:
        for rank, row_id in enumerate(ranking, start=1):
            scores[row_id] += 1.0 / (FUSION_CONSTANT + rank)
    return sorted(scores.items(), key=lambda scored: -scored[1])
