"""The rows' home: one writer thread with group commit, and readers that cannot write.

This module refuses to know what the rows mean. The flow of a write: it is queued with a future, the writer takes
all that wait, runs each behind a savepoint of its own inside one transaction, commits once with `synchronous=FULL`,
and only then do the futures resolve: an awaited write is on the disk.

Invariants: one connection per file writes and checkpoints (SQLite up to 3.51.2 can corrupt a WAL database when one
connection commits while another checkpoints); a failed write leaves nothing behind and never fails its neighbours.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, CursorResult, Engine, Executable, Row, create_engine, event
from sqlalchemy.exc import DatabaseError, DBAPIError, IntegrityError, ProgrammingError
from sqlmodel import Session

from memory.errors import StorageError
from memory.migrations.upgrade import upgrade
from memory.schema import dump_json
from memory.tally import Tally

T = TypeVar("T")
Work = Callable[[Connection], Any]

MAX_BATCH = 512  # writes that share one commit
MAX_READERS = 16
WRITER_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "busy_timeout=30000",
    "foreign_keys=ON",
    "mmap_size=0",
    "journal_size_limit=67108864",
)
READER_PRAGMAS = ("busy_timeout=30000", "query_only=ON", "wal_autocheckpoint=0", "mmap_size=0")


@dataclass
class _Write:
    """One queued write and whom to tell. `loop` is None where a thread waits instead of a task."""

    work: Work
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
    """One SQLite file, open. Everything that was awaited is durable; readers see only what is committed."""

    def __init__(self, path_or_url: Path | str) -> None:
        """Open the file, creating it if it is missing, and bring its tables up to date.

        Raises: StorageError when it can't be opened, DatabaseTooNew when a later version of this program wrote it.
        """
        self.path = _path_of(path_or_url)
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._is_open = True
        self.acknowledgements = Tally()
        """From the queue to the disk, of every write that got there."""
        self._gate = threading.Lock()  # nothing may be queued behind the mark that ends the writer
        self._writing = _make_engine(self.path, WRITER_PRAGMAS, begin="BEGIN IMMEDIATE", num_connections=1)
        self._reading = _make_engine(self.path, READER_PRAGMAS, begin="BEGIN", num_connections=MAX_READERS)
        try:
            with self._writing.connect() as connection:
                upgrade(connection)
        except DBAPIError as error:
            self._writing.dispose()
            raise self._storage_error(error) from error
        except BaseException:
            self._writing.dispose()
            raise
        self._writer = threading.Thread(target=self._write_forever, name="ratchet-writer", daemon=True)
        self._writer.start()

    async def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in the writer's next transaction; return its result once that is durable.

        `work` may run a second time when its transaction failed for a neighbour's sake: it must change nothing but
        rows, and must not attach rows of the caller's. Cancelling the wait does not undo the write.
        Raises: what `work` raises, or StorageError.
        """
        return await self._enqueue(lambda connection: _in_session(connection, work))

    async def execute(self, statement: Executable, values: Mapping[str, Any]) -> CursorResult:
        """The hot path: run one Core statement, which is atomic by itself, in the writer's next transaction."""
        return await self._enqueue(lambda connection: connection.execute(statement, values))

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

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Row[Any]]:
        """The hot path of reads: return the rows of one Core statement, for less than half of what a session costs."""
        with self._reads(), self._reading.connect() as connection:
            return connection.execute(statement, values).all()

    @contextlib.contextmanager
    def _reads(self) -> Iterator[None]:
        if not self._is_open:
            raise self._closed_error()
        try:
            yield
        except DatabaseError as error:
            if isinstance(error, IntegrityError | ProgrammingError):
                raise
            raise self._storage_error(error) from error

    @property
    def num_queued(self) -> int:
        """How many writes wait for the writer."""
        return self._queue.qsize()

    def check(self) -> list[str]:
        """Return what SQLite finds wrong with the file: an empty list when all is well. Reads every page."""
        with self.read() as session:
            connection = session.connection()
            problems = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check")]
            orphans = [
                f"{row[0]} row {row[1]} has no {row[2]}"
                for row in connection.exec_driver_sql("PRAGMA foreign_key_check")
            ]
        return [problem for problem in problems if problem != "ok"] + orphans

    def close(self) -> None:
        """Finish what is queued, then close. The writer closes last: the last connection out checkpoints."""
        with self._gate:
            if not self._is_open:
                return
            self._is_open = False
            self._queue.put(None)
        self._writer.join()
        self._reading.dispose()
        self._writing.dispose()

    async def _enqueue(self, work: Work) -> Any:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._put(_Write(work, future, loop))
        return await future

    def _put(self, write: _Write) -> None:
        with self._gate:
            if not self._is_open:
                raise self._closed_error()
            self._queue.put(write)

    def _write_forever(self) -> None:
        with self._writing.connect() as connection:
            while (batch := self._next_batch()) is not None:
                self._commit(connection, batch)
                self._count(batch)
                _tell(batch)

    def _count(self, batch: list[_Write]) -> None:
        now = time.monotonic()
        for write in batch:
            if write.error is None:
                self.acknowledgements.add(now - write.queued_at)

    def _next_batch(self) -> list[_Write] | None:
        """Wait for a write, then take all that are waiting behind it; None when the database closes."""
        first = self._queue.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < MAX_BATCH:
            try:
                write = self._queue.get_nowait()
            except queue.Empty:
                break
            if write is None:
                self._queue.put(None)  # close() after this batch
                break
            batch.append(write)
        return batch

    def _commit(self, connection: Connection, batch: list[_Write]) -> None:
        """Run the batch in one transaction, or, when that fails as a whole, each of its writes in one of its own."""
        try:
            with connection.begin():
                for write in batch:
                    self._run(connection, write)
                    # On some failures (a full disk) SQLite rolls the whole transaction back, savepoints and all.
                    if write.error is not None and not _is_in_transaction(connection):
                        raise write.error
        except Exception as error:
            if len(batch) > 1:
                for write in batch:
                    self._commit(connection, [write])
                return
            batch[0].result, batch[0].error = None, self._classified(error)

    def _run(self, connection: Connection, write: _Write) -> None:
        write.result = write.error = None
        try:
            write.result = write.work(connection)
        except Exception as error:
            write.error = self._classified(error)

    def _classified(self, error: Exception) -> Exception:
        is_disk = isinstance(error, DatabaseError) and not isinstance(error, IntegrityError | ProgrammingError)
        return self._storage_error(error) if is_disk else error

    def _closed_error(self) -> StorageError:
        return StorageError(f"the database {str(self.path)!r} is closed: open it again")

    def _storage_error(self, error: DBAPIError) -> StorageError:
        said = str(error.orig)
        mends = {
            "full": "free some disk space; nothing that was acknowledged is lost",
            "readonly": "make the file and its directory writable",
            "unable to open": "check that the directory exists and is writable",
            "malformed": "restore a backup: the file is damaged",
            "not a database": "restore a backup: the file is damaged",
            "locked": "close the other program that writes to it",
        }
        mend = next((mend for sign, mend in mends.items() if sign in said), "check the disk")
        storage_error = StorageError(f"cannot use the database {str(self.path)!r}: {said}; {mend}")
        storage_error.__cause__ = error
        return storage_error


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


def _is_in_transaction(connection: Connection) -> bool:
    return connection.connection.driver_connection.in_transaction


def _path_of(path_or_url: Path | str) -> Path:
    text = str(path_or_url)
    if "://" not in text:
        return Path(text)
    if not text.startswith("sqlite:///"):
        raise ValueError(f"unsupported database {text!r}: give a path, or a URL that begins with sqlite:///")
    return Path(text.removeprefix("sqlite:///"))


def _make_engine(path: Path, pragmas: tuple[str, ...], *, begin: str, num_connections: int) -> Engine:
    """Make a pool of connections that each begin with `pragmas` and begin transactions in their own way."""
    engine = create_engine(
        f"sqlite:///{path}",
        pool_size=min(num_connections, 4),
        max_overflow=max(0, num_connections - 4),
        connect_args={"check_same_thread": False},
        json_serializer=dump_json,
    )

    @event.listens_for(engine, "connect")
    def _prepare(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None  # the driver must not begin transactions of its own
        for pragma in pragmas:
            dbapi_connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if begin == "BEGIN":  # touches nothing, so it cannot fail: past SQLAlchemy, where it would be a third of a read
            connection.connection.driver_connection.execute(begin)
        else:
            connection.exec_driver_sql(begin)

    @event.listens_for(engine, "do_execute")
    def _skip_what_is_undone(cursor: Any, statement: str, _parameters: Any, _context: Any) -> bool:
        # After a failure for which SQLite rolled everything back itself, a rollback to a savepoint that is gone
        # would fail and hide the failure.
        return statement.startswith("ROLLBACK TO") and not cursor.connection.in_transaction

    return engine
