"""The database: one writer thread with group commit, and readers that cannot write.

A write is queued with a future. The writer takes all waiting writes, runs each behind a savepoint of its own inside one
transaction, commits once, durably, and only then resolves the futures: an awaited write is on the disk.

Invariants: one connection of a process writes and checkpoints (SQLite up to 3.51.2 can corrupt a WAL database when one
connection commits while another checkpoints); a failed write leaves nothing behind and never fails its neighbours.
Hazard: a server that is lost during a commit leaves it unknown whether the writes were stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Executable, Insert
from sqlalchemy.exc import DatabaseError, DBAPIError, IntegrityError, ProgrammingError
from sqlmodel import Session

from memory.errors import StorageError
from memory.storage.dialects import dialect_of
from memory.storage.histogram import Histogram
from memory.storage.migrations.upgrade import upgrade

T = TypeVar("T")
Work = Callable[[Connection], Any]

MAX_BATCH = 512  # writes that share one commit


@dataclass(frozen=True, slots=True)
class _RowInsert:
    """Work that is one guarded INSERT, which adds one row or none."""

    statement: Insert
    bound: Any
    """The row's values as `Dialect.bind` returns them."""


@dataclass(slots=True)
class _Write:
    """One queued write and the future of its caller. `loop` is None when a thread waits instead of a task."""

    work: Work | _RowInsert
    future: asyncio.Future | Future
    loop: asyncio.AbstractEventLoop | None
    result: Any = None
    error: BaseException | None = None
    queued_at: float = field(default_factory=time.monotonic)

    def settle(self) -> None:
        """Resolve the future with the result or the error. Runs on the future's own loop or in the writer."""
        if self.future.done():  # its task was cancelled; the write is committed all the same
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Database:
    """An open database. Every awaited write is durable; readers see committed rows only."""

    def __init__(
        self,
        path_or_url: Path | str,
        *,
        prepare: Callable[[Connection], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Open the database, creating a missing file, and upgrade its tables, or call `prepare` instead.

        `on_close` is called after the last write, once all connections are closed. Raises: StorageError when it cannot
        be opened; DatabaseTooNew when a later version of this program wrote it; ValueError for an invalid URL.
        """
        self._dialect = dialect_of(path_or_url)
        self._is_open = True
        self._on_close = on_close
        self._waiting: list[_Write] = []
        self._waking: set[asyncio.AbstractEventLoop] = set()
        self.acknowledgements = Histogram()
        """Durations of successful writes, from the queue to the disk."""
        self._condition = threading.Condition()  # guards the attributes that the writer thread and its callers share
        self._writing, self._reading = self._dialect.writing, self._dialect.reading
        try:
            with self._writing.connect() as connection:
                (prepare or upgrade)(connection)
            self._connection = self._writing.connect()
        except DBAPIError as error:
            self._dialect.close()
            raise self._translated(error) from error
        except BaseException:
            self._dialect.close()
            raise
        # A daemon: a process that forgets `close` can still exit.
        self._writer = threading.Thread(target=self._write_forever, name="ratchet-writer", daemon=True)
        self._writer.start()

    @property
    def kind(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._dialect.name

    @property
    def location(self) -> str:
        """The file or server, for messages; without a password."""
        return self._dialect.location

    async def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in the writer's next transaction; return its result once that is durable.

        `work` may run twice, because a neighbour's failure can end the transaction: it must change nothing but rows,
        and must not attach rows of its caller. Cancelling the wait does not undo the write.
        Raises: the errors of `work`, and StorageError.
        """
        return await self._enqueue(lambda connection: _in_session(connection, work))

    async def insert_row(self, statement: Insert, values: Mapping[str, Any]) -> bool:
        """Run a guarded INSERT, the hot path of writes; return whether it added its row, once durable.

        `values` may hold more names than the statement binds. Consecutive writes of the same statement go to the
        driver together.
        """
        return await self._enqueue(_RowInsert(statement, self._dialect.bind(statement, values)))

    def write_sync(self, work: Callable[[Session], T]) -> T:
        """Do `write` from a thread without an event loop. Blocks until the write is durable."""
        future: Future = Future()
        self._put(_Write(lambda connection: _in_session(connection, work), future, loop=None))
        return future.result()

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session that sees one snapshot of the database and cannot write. Its rows stay usable, detached."""
        with self._reads(), Session(self._reading, expire_on_commit=False, autoflush=False) as session:
            yield session

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """Return the result of a Core statement over numbers and plain texts: the hot path of reads."""
        with self._reads():
            return self._dialect.fetch(statement, values)

    @contextlib.contextmanager
    def _reads(self) -> Iterator[None]:
        if not self._is_open:
            raise self._closed_error()
        try:
            yield
        except DatabaseError as error:
            if isinstance(error, IntegrityError | ProgrammingError):
                raise
            raise self._translated(error) from error

    @property
    def num_queued(self) -> int:
        """The number of writes that wait for the writer."""
        return len(self._waiting)

    def check(self) -> list[str]:
        """Return the problems of the database; an empty list when it is sound. Reads a whole SQLite file."""
        with self.read() as session:
            return self._dialect.check(session)

    def close(self) -> None:
        """Finish the queued writes, then close. The writer closes last: SQLite's last connection checkpoints."""
        with self._condition:
            if not self._is_open:
                return
            self._is_open = False
            self._condition.notify()
        self._writer.join()
        self._dialect.close()
        if self._on_close is not None:
            self._on_close()

    async def _enqueue(self, work: Work | _RowInsert) -> Any:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._put(_Write(work, future, loop))
        return await future

    def _put(self, write: _Write) -> None:
        with self._condition:
            if not self._is_open:
                raise self._closed_error()
            self._waiting.append(write)
            if write.loop is None:
                self._condition.notify()
            elif write.loop not in self._waking:
                self._waking.add(write.loop)
                # call_soon, not its thread-safe form: a write with a loop is queued on that loop's own thread
                write.loop.call_soon(self._wake, write.loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake the writer after the loop's ready tasks have run, so that their writes share one commit."""
        with self._condition:
            self._waking.discard(loop)
            self._condition.notify()

    def _write_forever(self) -> None:
        with self._connection as connection:
            # `close` ends this only once the queue is empty. Order: futures before the checkpoint, which takes longer
            while batch := self._next_batch():
                self._commit(connection, batch)
                self._count(batch)
                _resolve(batch)
                self._dialect.after_commit(connection, len(batch))

    def _count(self, batch: list[_Write]) -> None:
        now = time.monotonic()
        for write in batch:
            if write.error is None:
                self.acknowledgements.add(now - write.queued_at)

    def _next_batch(self) -> list[_Write]:
        """Wait for a write, then return up to `MAX_BATCH` waiting ones; an empty list when the database closes."""
        with self._condition:
            while not self._waiting and self._is_open:
                self._condition.wait()
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            return batch

    def _commit(self, connection: Connection, batch: list[_Write], *, is_second_try: bool = False) -> None:
        """Run the batch in one transaction; when that fails as a whole, run each write in a transaction of its own."""
        is_committing = False
        try:
            with connection.begin():
                for same in _group(batch):
                    self._run(connection, same)
                    # A failure may end the whole transaction in spite of savepoints: in SQLite on a full disk, in
                    # PostgreSQL for a statement outside a savepoint.
                    failed = next((write.error for write in same if write.error is not None), None)
                    if failed is not None and not self._dialect.is_in_transaction(connection):
                        raise failed
                # a connection that is lost from here on leaves the outcome unknown, so the batch must not be repeated
                is_committing = True
        except Exception as error:
            if connection.invalidated and not is_committing and not is_second_try:
                self._commit(connection, batch, is_second_try=True)  # reconnects; nothing was committed
            elif connection.invalidated or len(batch) == 1:
                is_in_doubt = connection.invalidated and is_committing
                for write in batch:
                    write.result = None
                    write.error = self._unknown_outcome_error() if is_in_doubt else self._classified(error)
            else:
                for write in batch:
                    self._commit(connection, [write])

    def _run(self, connection: Connection, same: list[_Write]) -> None:
        """Run one piece of work, or all rows of one statement, and set the results or errors of its writes."""
        work = same[0].work
        try:
            if isinstance(work, _RowInsert):
                rows = [write.work.bound for write in same if isinstance(write.work, _RowInsert)]
                results = self._dialect.insert_rows(connection, work.statement, rows)
            else:
                results = [work(connection)]
        except Exception as error:
            results = [error] * len(same)
        for write, result in zip(same, results, strict=True):
            if isinstance(result, Exception):
                write.result, write.error = None, self._classified(result)
            else:
                write.result, write.error = result, None

    def _classified(self, error: Exception) -> Exception:
        """Return StorageError for a failure of the storage, and any other error as it is."""
        if isinstance(error, DatabaseError) and not isinstance(error, IntegrityError | ProgrammingError):
            return self._translated(error)
        return error

    def _translated(self, error: DBAPIError) -> Exception:
        translated = self._dialect.translate(error)
        translated.__cause__ = error
        return translated

    def _unknown_outcome_error(self) -> StorageError:
        return StorageError(
            f"lost the database {self.location} during a commit: see whether it is there, then try again"
        )

    def _closed_error(self) -> StorageError:
        return StorageError(f"the database {self.location} is closed: open it again")


def _group(batch: list[_Write]) -> Iterator[list[_Write]]:
    """Yield the batch in order; consecutive rows of the same statement form one group."""

    def kind_of(write: _Write) -> int:
        return id(write.work.statement if isinstance(write.work, _RowInsert) else write)

    # by identity, and neighbours only, so that the order of writes is kept: a statement that is built anew for each
    # write shares no group
    for _, same in itertools.groupby(batch, kind_of):
        yield list(same)


def _in_session(connection: Connection, work: Callable[[Session], T]) -> T:
    """Run `work` behind a savepoint, so that an error undoes this work only."""
    # rows must stay readable after the commit, in the thread of the caller
    with Session(connection, expire_on_commit=False, join_transaction_mode="create_savepoint") as session:
        result = work(session)
        session.commit()  # releases the savepoint; the batch commits to the disk
        return result


def _resolve(batch: list[_Write]) -> None:
    """Resolve the futures, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop | None, list[_Write]] = defaultdict(list)
    for write in batch:
        by_loop[write.loop].append(write)
    for loop, writes in by_loop.items():
        if loop is None:
            _settle_all(writes)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so no task waits
                loop.call_soon_threadsafe(_settle_all, writes)


def _settle_all(writes: list[_Write]) -> None:
    for write in writes:
        write.settle()
