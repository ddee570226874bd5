"""Keeps the index in step with the rows: one thread that reads the outbox, and heals whatever the index lost.

This module refuses to know how rows are found. The flow: words first, then the mark in the outbox that they are
held; then meanings; only then the outbox row goes. Each outbox row only says "look at this row again", so doing
it twice is harmless, and to heal is to put what differs back into the outbox.

Invariant: an empty outbox after the first reconciliation means that both indexes hold exactly what the rows say.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, update
from sqlmodel import Session, col, select

from memory.errors import IndexDamaged, IndexUnavailable, StorageError
from memory.schema import Outbox
from memory.search.backlog import Backlog, Entry
from memory.search.encoder import Encoder, QueryEncoder, encode
from memory.search.indexed_rows import COLLECTIONS, IndexedRow, IndexedRows
from memory.search.text_index import TextIndex
from memory.search.vector_index import VectorIndex
from memory.storage.database import Database

if TYPE_CHECKING:
    import numpy

POLL_SECONDS = 0.25
MAX_PAUSE_SECONDS = 30.0
WORDS_BATCH = 500
MEANINGS_BATCH = 256  # Chroma takes as long for a few as for many
ENCODE_BATCH = 8  # small: a question may be waiting for the encoder
STOP_SECONDS = 5.0

logger = logging.getLogger(__name__)


class IndexSync:
    """The thread that owns both indexes' contents. Everyone else only reads them."""

    def __init__(
        self,
        database: Database,
        searchables: IndexedRows,
        words: TextIndex,
        meanings: VectorIndex,
        encoder: Encoder,
        queries: QueryEncoder,
    ) -> None:
        self._database = database
        self._searchables = searchables
        self._words = words
        self._meanings = meanings
        self._encoder = encoder
        self._queries = queries
        self._backlog = Backlog()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._suspected = threading.Event()
        self._rebuilds: list[Future] = []
        self._num_failures = 0
        self._is_reconciled = False
        self.last_failure: Exception | None = None
        self._thread = threading.Thread(target=self._follow_forever, name="ratchet-follower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop between two batches. A thread that hangs in Chroma is left to die with the process."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def wake(self) -> None:
        """Look at the outbox now rather than at the next poll."""
        self._wake.set()

    def suspect(self) -> None:
        """Have the index of meanings checked, and made anew if it is damaged: a question to it failed."""
        self._suspected.set()
        self._wake.set()

    def request_rebuild(self) -> Future:
        """Have both indexes made anew from the rows; the future resolves when the work is queued in the outbox."""
        future: Future = Future()
        self._rebuilds.append(future)
        self._wake.set()
        return future

    @property
    def is_settled(self) -> bool:
        """Whether both indexes hold exactly what the rows say."""
        if not self._is_reconciled or self._rebuilds:
            return False
        with self._database.read() as session:
            return session.exec(select(Outbox.id).limit(1)).first() is None

    def _follow_forever(self) -> None:
        while not self._stopping.is_set():
            is_busy = False
            try:
                is_busy = self._follow()
                self._num_failures = 0
                self.last_failure = None
            except (IndexUnavailable, StorageError, OSError) as error:
                self._backlog.reset()
                if self._stopping.is_set():
                    return
                self._note_failure(error)
            if not is_busy:
                self._wake.wait(min(POLL_SECONDS * 2**self._num_failures, MAX_PAUSE_SECONDS))
                self._wake.clear()

    def _follow(self) -> bool:
        """Do one batch of everything there is to do; say whether there may be more."""
        if self._rebuilds:
            self._rebuild()
        has_more = self._follow_words()
        self._open()
        return self._follow_meanings() or has_more

    def _note_failure(self, error: Exception) -> None:
        """Log it, and mend: the first time open the index again, from the second time on make it anew."""
        self.last_failure = error
        self._num_failures = min(self._num_failures + 1, 16)
        logger.warning("the index fell behind, words must do for now: %s", error)
        if isinstance(error, IndexDamaged):
            self._is_reconciled = False
            if self._num_failures == 1:
                self._meanings.close()
            else:
                self._meanings.set_aside()

    def _follow_words(self) -> bool:
        """Bring the word index up to date, then mark in the outbox what it holds."""
        with self._database.read() as session:
            self._backlog.read(session)
            batch = self._backlog.take_for_words(WORDS_BATCH)
            loaded = self._load(session, batch)
        if not batch:
            return False

        def hold(session: Session) -> None:
            for collection, (row_ids, entries) in loaded.items():
                self._words.replace(session, collection, row_ids, entries)

        self._words.write(hold)
        marked = update(Outbox).where(col(Outbox.id).in_([it.id for it in batch])).values(is_worded=True)
        self._database.write_sync(lambda session: session.execute(marked))
        self._backlog.note_worded(batch)
        return len(batch) == WORDS_BATCH

    def _follow_meanings(self) -> bool:
        """Bring the index of meanings up to date, then delete what both indexes hold from the outbox."""
        batch = self._backlog.take_for_meanings(MEANINGS_BATCH)
        if not batch:
            return False
        with self._database.read() as session:
            loaded = self._load(session, batch)
        for collection, (row_ids, entries) in loaded.items():
            if entries:
                ids_at = partial(self._words.ids_at, collection)
                self._meanings.upsert(collection, entries, self._encode(entries), ids_at=ids_at)
            self._meanings.forget(collection, set(row_ids) - {entry.row_id for entry in entries})
        ids = [it.id for it in batch]
        self._database.write_sync(lambda session: session.execute(delete(Outbox).where(col(Outbox.id).in_(ids))))
        return len(batch) == MEANINGS_BATCH

    def _load(self, session: Session, batch: Iterable[Entry]) -> dict[str, tuple[list[str], list[IndexedRow]]]:
        """Return, by collection, the ids that the outbox names, and what is searchable of them now."""
        return {
            collection: (row_ids, self._searchables.load(session, collection, row_ids))
            for collection, row_ids in _by_collection(batch).items()
        }

    def _encode(self, entries: Sequence[IndexedRow]) -> list[numpy.ndarray]:
        """Return the vector of each, a few encoded at a time. Raises: IndexUnavailable, also when it is to stop."""
        vectors: list[numpy.ndarray] = []
        for start in range(0, len(entries), ENCODE_BATCH):
            if self._stopping.is_set():
                raise IndexUnavailable("the index was closed while rows were encoded")
            vectors += list(encode(self._encoder, [entry.text for entry in entries[start : start + ENCODE_BATCH]]))
        return vectors

    def _open(self) -> None:
        """Load the encoder and open the index, once; check the index when a question to it failed."""
        if not self._queries.is_ready:
            self._queries.warm()
            if self._stopping.is_set():  # loading took long, and the directory may have another owner by now
                raise IndexUnavailable("the index was closed while the encoder loaded")
        if self._meanings.is_open and (self._suspected.is_set() or not self._meanings.is_whole):
            self._suspected.clear()
            self._meanings.verify()
        if not self._meanings.is_open:
            self._meanings.open()
            self._is_reconciled = False
        if not self._is_reconciled:
            self._reconcile()
            self._is_reconciled = True

    def _rebuild(self) -> None:
        """Fill the word index anew in one transaction, begin an empty index of meanings, and queue all rows for it."""

        def fill(words: Session) -> None:
            with self._database.read() as session:
                everything = {collection: self._searchables.load_all(session, collection) for collection in COLLECTIONS}
                self._words.rebuild(words, everything)

        self._words.write(fill)
        self._meanings.set_aside()
        self._open()
        waiting, self._rebuilds = self._rebuilds, []
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _reconcile(self) -> None:
        """Compare both indexes with the rows, and have whatever differs looked at again."""
        for collection in COLLECTIONS:
            meant = self._meanings.digests(collection)
            with self._database.read() as session:
                expected = {it.row_id: it.digest for it in self._searchables.load_all(session, collection)}
            worded = self._words.digests(collection)
            self._look_again(collection, _differing(expected, worded), is_worded=False)
            self._look_again(collection, _differing(expected, meant), is_worded=True)

    def _look_again(self, collection: str, row_ids: Iterable[str], *, is_worded: bool) -> None:
        values = [{"collection": collection, "row_id": row_id, "is_worded": is_worded} for row_id in sorted(row_ids)]
        if values:
            self._database.write_sync(lambda session: session.execute(insert(Outbox), values))


def _by_collection(rows: Iterable[Entry]) -> dict[str, list[str]]:
    ids: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        ids[row.collection][row.row_id] = None  # once each, in order
    return {collection: list(row_ids) for collection, row_ids in ids.items()}


def _differing(expected: dict[str, str], held: dict[str, str]) -> set[str]:
    return {row_id for row_id in expected.keys() | held.keys() if expected.get(row_id) != held.get(row_id)}
