"""The rows' home: one writer thread with group commit, and readers that cannot write.

This module refuses to know what the rows mean, and whether a file or a server holds them. The flow of a write: it is
queued with a future, the writer takes all that wait, runs each behind a savepoint of its own inside one transaction,
commits once, durably, and only then do the futures resolve: an awaited write is on the disk.

Invariants: one connection of a process writes and checkpoints (SQLite up to 3.51.2 can corrupt a WAL database when one
connection commits while another checkpoints); a failed write leaves nothing behind and never fails its neighbours. One
exception: a server lost in the very moment of a commit doesn't tell whether it kept what it was told.
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
class _Row:
    """Work that is one statement, which takes one row or none."""

    statement: Insert
    bound: Any


@dataclass(slots=True)
class _Write:
    """One queued write and whom to tell. `loop` is None where a thread waits instead of a task."""

    work: Work | _Row
    future: asyncio.Future | Future
    loop: asyncio.AbstractEventLoop | None
    result: Any = None
    error: BaseException | None = None
    queued_at: float = field(default_factory=time.monotonic)

    def settle(self) -> None:
        if self.future.done():  # its task was cancelled; the write stands all the same
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Database:
    """One place for rows, open. Everything that was awaited is durable; readers see only what is committed."""

    def __init__(
        self,
        path_or_url: Path | str,
        *,
        prepare: Callable[[Connection], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Open it, creating a file that is missing, and bring its tables up to date, or do what `prepare` does instead.
        `on_close` is called once everything is written and closed.

        Raises: StorageError when it can't be opened, DatabaseTooNew when a later version of this program wrote it,
        ValueError for a URL that can't be.
        """
        self._dialect = dialect_of(path_or_url)
        self._is_open = True
        self._on_close = on_close
        self._waiting: list[_Write] = []
        self._waking: set[asyncio.AbstractEventLoop] = set()
        self.acknowledgements = Histogram()
        """From the queue to the disk, of every write that got there."""
        self._gate = threading.Condition()  # around all that the writer shares with those who write
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
        self._writer = threading.Thread(target=self._write_forever, name="ratchet-writer", daemon=True)
        self._writer.start()

    @property
    def kind(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._dialect.name

    @property
    def place(self) -> str:
        """Where the rows are, for messages; without a password."""
        return self._dialect.place

    async def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in the writer's next transaction; return its result once that is durable.

        `work` may run a second time when its transaction failed for a neighbour's sake: it must change nothing but
        rows, and must not attach rows of the caller's. Cancelling the wait does not undo the write.
        Raises: what `work` raises, or StorageError.
        """
        return await self._enqueue(lambda connection: _in_session(connection, work))

    async def take(self, statement: Insert, values: Mapping[str, Any]) -> bool:
        """The hot path: run a Core statement that takes one row or none; return whether it took it, once durable.

        Of `values` it takes what it names. Writes of the same statement that wait next to each other are handed to the
        driver together.
        """
        return await self._enqueue(_Row(statement, self._dialect.bind(statement, values)))

    def write_sync(self, work: Callable[[Session], T]) -> T:
        """`write` for threads without an event loop. Never call it on one: it blocks until the disk has it."""
        future: Future = Future()
        self._put(_Write(lambda connection: _in_session(connection, work), future, loop=None))
        return future.result()

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Give a session that sees one moment of the database and cannot write. Rows outlive it, detached."""
        with self._reads(), Session(self._reading, expire_on_commit=False, autoflush=False) as session:
            yield session

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """The hot path of reads: return the rows of numbers and plain texts that a Core statement finds at once."""
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
        """How many writes wait for the writer."""
        return len(self._waiting)

    def check(self) -> list[str]:
        """Return what is wrong with the rows' home: an empty list when all is well. A whole file is read for it."""
        with self.read() as session:
            return self._dialect.check(session)

    def close(self) -> None:
        """Finish what is queued, then close. The writer closes last: the last connection out checkpoints."""
        with self._gate:
            if not self._is_open:
                return
            self._is_open = False
            self._gate.notify()
        self._writer.join()
        self._dialect.close()
        if self._on_close is not None:
            self._on_close()

    async def _enqueue(self, work: Work | _Row) -> Any:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._put(_Write(work, future, loop))
        return await future

    def _put(self, write: _Write) -> None:
        with self._gate:
            if not self._is_open:
                raise self._closed_error()
            self._waiting.append(write)
            if write.loop is None:
                self._gate.notify()
            elif write.loop not in self._waking:
                self._waking.add(write.loop)
                write.loop.call_soon(self._wake, write.loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake the writer once the loop's tasks had their turn: woken by the first, it would commit that one alone."""
        with self._gate:
            self._waking.discard(loop)
            self._gate.notify()

    def _write_forever(self) -> None:
        with self._connection as connection:
            while batch := self._next_batch():
                self._commit(connection, batch)
                self._count(batch)
                _tell(batch)
                self._dialect.tidy(connection, len(batch))

    def _count(self, batch: list[_Write]) -> None:
        now = time.monotonic()
        for write in batch:
            if write.error is None:
                self.acknowledgements.add(now - write.queued_at)

    def _next_batch(self) -> list[_Write]:
        """Wait for a write, then take all that are waiting; none when the database closes."""
        with self._gate:
            while not self._waiting and self._is_open:
                self._gate.wait()
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            return batch

    def _commit(self, connection: Connection, batch: list[_Write], *, is_second_try: bool = False) -> None:
        """Run the batch in one transaction, or, when that fails as a whole, each of its writes in one of its own."""
        is_ending = False
        try:
            with connection.begin():
                for same in _group(batch):
                    self._run(connection, same)
                    # A failure may end the whole transaction, savepoints and all: on a full disk SQLite's, on
                    # PostgreSQL that of a statement without a savepoint.
                    failed = next((write.error for write in same if write.error is not None), None)
                    if failed is not None and not self._dialect.is_in_transaction(connection):
                        raise failed
                is_ending = True
        except Exception as error:
            if connection.invalidated and not is_ending and not is_second_try:
                self._commit(connection, batch, is_second_try=True)  # by a new connection: the old one kept nothing
            elif connection.invalidated or len(batch) == 1:
                is_in_doubt = connection.invalidated and is_ending
                for write in batch:
                    write.result, write.error = None, self._doubt() if is_in_doubt else self._classified(error)
            else:
                for write in batch:
                    self._commit(connection, [write])

    def _run(self, connection: Connection, same: list[_Write]) -> None:
        """Run one piece of work, or the rows of one statement."""
        work = same[0].work
        try:
            if isinstance(work, _Row):
                came = self._dialect.take(connection, work.statement, [write.work.bound for write in same])
            else:
                came = [work(connection)]
        except Exception as error:
            came = [error] * len(same)
        for write, result in zip(same, came, strict=True):
            is_error = isinstance(result, Exception)
            write.result, write.error = (None, self._classified(result)) if is_error else (result, None)

    def _classified(self, error: Exception) -> Exception:
        is_refusal = isinstance(error, DatabaseError) and not isinstance(error, IntegrityError | ProgrammingError)
        return self._translated(error) if is_refusal else error

    def _translated(self, error: DBAPIError) -> Exception:
        translated = self._dialect.translate(error)
        translated.__cause__ = error
        return translated

    def _doubt(self) -> StorageError:
        return StorageError(
            f"lost the database {self.place} while it kept this: see whether it is there, then try again"
        )

    def _closed_error(self) -> StorageError:
        return StorageError(f"the database {self.place} is closed: open it again")


def _group(batch: list[_Write]) -> Iterator[list[_Write]]:
    """Yield the batch in order, rows of the same statement that follow each other as one."""

    def kind_of(write: _Write) -> int:
        return id(write.work.statement if isinstance(write.work, _Row) else write)

    for _, same in itertools.groupby(batch, kind_of):
        yield list(same)


def _in_session(connection: Connection, work: Callable[[Session], T]) -> T:
    """Run `work` behind a savepoint: what it raises undoes what it did, and nothing else."""
    with Session(connection, expire_on_commit=False, join_transaction_mode="create_savepoint") as session:
        result = work(session)
        session.commit()  # releases the savepoint; the disk gets it with the batch
        return result


def _tell(batch: list[_Write]) -> None:
    """Resolve the futures, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop | None, list[_Write]] = defaultdict(list)
    for write in batch:
        by_loop[write.loop].append(write)
    for loop, writes in by_loop.items():
        if loop is None:
            _settle_all(writes)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle_all, writes)


def _settle_all(writes: list[_Write]) -> None:
    for write in writes:
        write.settle()
