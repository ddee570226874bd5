"""Keeps both indexes in step with the rows: one thread that drains the outbox and repairs a damaged index.

Order: an outbox row is written to the text index and marked (`is_in_text_index`), then to the vector index, and only
then deleted. An outbox row means "read this row again", so processing it twice is harmless, and a repair puts the rows
that differ back into the outbox.

Invariant: an empty outbox after the first reconciliation means that both indexes hold exactly the searchable rows.
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
from memory.search.backlog import Backlog, OutboxEntry
from memory.search.encoder import Encoder, QueryEncoder, encode
from memory.search.indexed_rows import COLLECTIONS, IndexedRow, IndexedRows
from memory.search.text_index import TextIndex
from memory.search.vector_index import VectorIndex
from memory.storage.database import Database

if TYPE_CHECKING:
    import numpy

POLL_SECONDS = 0.25
MAX_PAUSE_SECONDS = 30.0
TEXT_BATCH = 500
VECTOR_BATCH = 256  # Chroma takes as long for a few as for many
ENCODE_BATCH = 8  # small, because a query may be waiting for the encoder
STOP_SECONDS = 5.0

logger = logging.getLogger(__name__)


class IndexSync:
    """The thread that writes both indexes. All other threads only read them."""

    def __init__(
        self,
        database: Database,
        indexed_rows: IndexedRows,
        text_index: TextIndex,
        vector_index: VectorIndex,
        encoder: Encoder,
        queries: QueryEncoder,
    ) -> None:
        self._database = database
        self._indexed_rows = indexed_rows
        self._text_index = text_index
        self._vector_index = vector_index
        self._encoder = encoder
        self._queries = queries
        self._backlog = Backlog()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._suspected = threading.Event()
        self._rebuilds: list[Future[None]] = []
        self._num_failures = 0
        self._is_reconciled = False
        self._is_checked = False
        self.last_failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ratchet-index-sync", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop between two batches. A thread that hangs in Chroma is abandoned: it is a daemon."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def wake(self) -> None:
        """Read the outbox now rather than at the next poll."""
        self._wake.set()

    def request_check(self) -> None:
        """Request a check of the vector index after a failed query; a damaged index is rebuilt."""
        self._suspected.set()
        self._wake.set()

    def request_rebuild(self) -> Future[None]:
        """Request a rebuild of both indexes; the future resolves when its rows are queued in the outbox."""
        future: Future[None] = Future()
        self._rebuilds.append(future)
        self._wake.set()
        return future

    @property
    def is_settled(self) -> bool:
        """Whether both indexes hold exactly the searchable rows, as far as a check that was requested has shown."""
        # in this order: `_open` changes the second before the first
        if self._suspected.is_set() or not self._is_checked:
            return False
        if not self._is_reconciled or self._rebuilds:
            return False
        with self._database.read() as session:
            return session.exec(select(Outbox.id).limit(1)).first() is None

    def _run(self) -> None:
        while not self._stopping.is_set():
            is_busy = False
            try:
                is_busy = self._sync_once()
                self._num_failures = 0
                self.last_failure = None
            except (IndexUnavailable, StorageError, OSError) as error:
                self._backlog.reset()  # entries were taken and not written: read them again
                if self._stopping.is_set():
                    return
                self._handle_failure(error)
            if not is_busy:
                self._wake.wait(min(POLL_SECONDS * 2**self._num_failures, MAX_PAUSE_SECONDS))
                # after the wait: a call of `wake` during the work before is not lost
                self._wake.clear()

    def _sync_once(self) -> bool:
        """Process one batch for each index; return whether there may be more."""
        if self._rebuilds:
            self._rebuild()
        has_more = self._sync_text_index()
        self._open()
        return self._sync_vector_index() or has_more

    def _handle_failure(self, error: Exception) -> None:
        """Log a failure. A damaged index is reopened after the first failure, and rebuilt after the second."""
        self.last_failure = error
        self._num_failures = min(self._num_failures + 1, 16)
        logger.warning("the vector index is behind, search falls back to words: %s", error)
        if isinstance(error, IndexDamaged):
            self._is_reconciled = False
            if self._num_failures == 1:
                self._vector_index.close()
            else:
                self._vector_index.set_aside()

    def _sync_text_index(self) -> bool:
        """Write one batch to the text index, then mark it in the outbox; return whether there may be more."""
        with self._database.read() as session:
            self._backlog.read(session)
            batch = self._backlog.take_for_text_index(TEXT_BATCH)
            loaded = self._load(session, batch)
        if not batch:
            return False

        def replace(session: Session) -> None:
            for collection, (row_ids, rows) in loaded.items():
                self._text_index.replace(session, collection, row_ids, rows)

        # Write, then mark: a crash in between repeats the batch.
        self._text_index.write(replace)
        marked = update(Outbox).where(col(Outbox.id).in_([it.id for it in batch])).values(is_in_text_index=True)
        self._database.write_sync(lambda session: session.execute(marked))
        self._backlog.queue_for_vector_index(batch)
        return len(batch) == TEXT_BATCH

    def _sync_vector_index(self) -> bool:
        """Write one batch to the vector index, then delete it from the outbox; return whether there may be more."""
        batch = self._backlog.take_for_vector_index(VECTOR_BATCH)
        if not batch:
            return False
        with self._database.read() as session:
            loaded = self._load(session, batch)
        for collection, (row_ids, rows) in loaded.items():
            if rows:
                newest_ids = partial(self._text_index.newest_of_partition, collection)
                self._vector_index.upsert(collection, rows, self._encode(rows), newest_ids=newest_ids)
            self._vector_index.forget(collection, set(row_ids) - {row.row_id for row in rows})
        # Last: a crash before this line repeats the batch, which is harmless.
        ids = [it.id for it in batch]
        self._database.write_sync(lambda session: session.execute(delete(Outbox).where(col(Outbox.id).in_(ids))))
        return len(batch) == VECTOR_BATCH

    def _load(self, session: Session, batch: Iterable[OutboxEntry]) -> dict[str, tuple[list[str], list[IndexedRow]]]:
        """Return, by collection, the row ids of a batch and those of the rows that are searchable now."""
        return {
            collection: (row_ids, self._indexed_rows.load(session, collection, row_ids))
            for collection, row_ids in _by_collection(batch).items()
        }

    def _encode(self, rows: Sequence[IndexedRow]) -> list[numpy.ndarray]:
        """Return the vector of each row, (dim,) float32. Raises: IndexUnavailable, also once `stop` was called."""
        vectors: list[numpy.ndarray] = []
        for start in range(0, len(rows), ENCODE_BATCH):
            if self._stopping.is_set():
                raise IndexUnavailable("the index was closed while rows were encoded")
            vectors += list(encode(self._encoder, [row.text for row in rows[start : start + ENCODE_BATCH]]))
        return vectors

    def _open(self) -> None:
        """Load the encoder, open the vector index and reconcile it, where that is still to do."""
        if not self._queries.is_ready:
            self._queries.warm()
            if self._stopping.is_set():  # loading took seconds, and the directory may have another owner by now
                raise IndexUnavailable("the index was closed while the encoder loaded")
        is_suspected = self._suspected.is_set() or not self._is_checked
        if self._vector_index.is_open and (is_suspected or not self._vector_index.is_whole):
            self._is_checked = False
            # before the check: a request that comes during it starts another
            self._suspected.clear()
            self._vector_index.verify()
        if not self._vector_index.is_open:
            self._vector_index.open()
            self._is_reconciled = False
        if not self._is_reconciled:
            self._reconcile()
            self._is_reconciled = True
        self._is_checked = True

    def _rebuild(self) -> None:
        """Refill the text index in one transaction, begin an empty vector index, and queue all rows for it."""

        def fill(index_session: Session) -> None:
            with self._database.read() as session:
                rows = {collection: self._indexed_rows.load_all(session, collection) for collection in COLLECTIONS}
                self._text_index.rebuild(index_session, rows)

        self._text_index.write(fill)
        self._vector_index.set_aside()
        self._open()
        requests, self._rebuilds = self._rebuilds, []  # a request from here on starts another rebuild
        for future in requests:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _reconcile(self) -> None:
        """Compare both indexes with the rows, and queue every row that differs."""
        for collection in COLLECTIONS:
            # The order is free: a row that changes in between has an outbox row of its own.
            in_vector_index = self._vector_index.digests(collection)
            with self._database.read() as session:
                expected = {it.row_id: it.digest for it in self._indexed_rows.load_all(session, collection)}
            in_text_index = self._text_index.digests(collection)
            self._queue(collection, _differing(expected, in_text_index), is_in_text_index=False)
            self._queue(collection, _differing(expected, in_vector_index), is_in_text_index=True)

    def _queue(self, collection: str, row_ids: Iterable[str], *, is_in_text_index: bool) -> None:
        values = [
            {"collection": collection, "row_id": row_id, "is_in_text_index": is_in_text_index}
            for row_id in sorted(row_ids)
        ]
        if values:
            self._database.write_sync(lambda session: session.execute(insert(Outbox), values))


def _by_collection(entries: Iterable[OutboxEntry]) -> dict[str, list[str]]:
    ids: dict[str, dict[str, None]] = defaultdict(dict)
    for entry in entries:
        ids[entry.collection][entry.row_id] = None  # once each, in order
    return {collection: list(row_ids) for collection, row_ids in ids.items()}


def _differing(expected: dict[str, str], actual: dict[str, str]) -> set[str]:
    return {row_id for row_id in expected.keys() | actual.keys() if expected.get(row_id) != actual.get(row_id)}
