"""Opens the memory in one data directory: its database, its records and its index.

Invariant: one process owns the directory, from `open` to `close`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from sqlalchemy import Connection

from memory.config import MemoryConfig
from memory.datasets.examples import Examples
from memory.datasets.exports import Exports
from memory.records.cycles import Cycles
from memory.records.documents import Documents
from memory.records.feedback import FeedbackRecords
from memory.records.insights import Insights
from memory.records.keys import Keys
from memory.records.policies import Policies
from memory.records.responses import Responses
from memory.records.reviews import Reviews
from memory.records.trajectories import Trajectories
from memory.records.verdicts import Verdicts
from memory.scopes import Scopes
from memory.search.encoder import Encoder, SentenceEncoder
from memory.search.index import MemoryIndex
from memory.search.retrieval import Retrieval
from memory.search.text_index import TextIndex
from memory.storage.copy_database import copy_rows
from memory.storage.database import Database
from memory.storage.lost_files import DatabaseTrace
from memory.storage.ownership import Ownership, take_ownership
from memory.storage.sequence import continue_sequence

DATABASE_NAME = "ratchet.db"
TEXT_INDEX_NAME = "words.db"
VECTOR_INDEX_NAME = "chroma"


class Memory:
    """All records of one data directory, and their retrieval. Create it with `Memory.open`."""

    def __init__(self, data_dir: Path, config: MemoryConfig, encoder: Encoder, ownership: Ownership) -> None:
        self.data_dir = data_dir
        self.config = config
        self.encoder = encoder
        self._ownership = ownership
        self.database = open_rows(data_dir, config)
        # With PostgreSQL the text index stays local, in a file beside Chroma.
        is_file = self.database.kind == "sqlite"
        self._text_database = (
            self.database if is_file else Database(data_dir / TEXT_INDEX_NAME, prepare=prepare_nothing)
        )
        self.scopes = Scopes(config.share_live)
        self.trajectories = Trajectories(self.database, success_reward=config.success_reward, scopes=self.scopes)
        self.insights = Insights(self.database, max_kept=config.max_kept_insights, scopes=self.scopes)
        self.reviews = Reviews(self.database, self.trajectories, self.scopes)
        self.documents = Documents(
            self.database, passage_tokens=config.passage_tokens, max_passages=config.max_document_passages
        )
        self.policies = Policies(self.database)
        self.cycles = Cycles(self.database)
        self.verdicts = Verdicts(self.database)
        self.responses = Responses(self.database)
        self.keys = Keys(self.database)
        self.feedback = FeedbackRecords(self.database, self.trajectories)
        self.examples = Examples(self.database, success_reward=config.success_reward)
        self.exports = Exports(self.database, self.trajectories, self.examples)
        self.index = MemoryIndex(
            self.database,
            TextIndex(self._text_database),
            self.trajectories,
            data_dir / VECTOR_INDEX_NAME,
            encoder,
            config,
        )
        self.retrieval = Retrieval(self.database, self.insights, self.trajectories, self.index, config)

    @classmethod
    def open(cls, data_dir: Path, config: MemoryConfig | None = None, *, encoder: Encoder | None = None) -> Memory:
        """Lock the directory, upgrade its database, and start the synchronisation of the index.

        A thread loads the encoder and Chroma; until then search uses words only.
        Raises: DataDirectoryInUse with the owner's address; StorageError.
        """
        config = config or MemoryConfig()
        data_dir = Path(data_dir).absolute()
        # first: all that follows creates or changes files of the directory
        ownership = take_ownership(data_dir)
        try:
            memory = cls(data_dir, config, encoder or SentenceEncoder(config.encoder), ownership)
        except BaseException:
            ownership.close()
            raise
        try:
            memory.documents.delete_unfinished()  # before the index starts, which would read their passages
        except BaseException:
            memory.close()
            raise
        memory.index.start()
        return memory

    def set_address(self, url: str) -> None:
        """Record this server's address, which a second process reports."""
        self._ownership.set_address(url)

    def close(self) -> None:
        """Finish pending writes, close everything and release the directory."""
        # Called in reverse: the index stops first, and the lock is released last.
        with contextlib.ExitStack() as stack:
            stack.callback(self._ownership.close)
            stack.callback(self.database.close)
            # with SQLite both are one object: closing it twice does nothing
            stack.callback(self._text_database.close)
            stack.callback(self.index.close)

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def open_keys(data_dir: Path, config: MemoryConfig | None = None) -> Iterator[Keys]:
    """Lock the directory and open its API keys, without encoder and index.

    Raises: DataDirectoryInUse with the owner's address; StorageError.
    """
    data_dir = Path(data_dir).absolute()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(take_ownership(data_dir)))
        yield Keys(stack.enter_context(contextlib.closing(open_rows(data_dir, config or MemoryConfig()))))


def copy_to_server(data_dir: Path, config: MemoryConfig) -> dict[str, int]:
    """Copy the rows of the directory's SQLite file into the configured server; return the number of rows by table.

    The file stays unchanged. Raises: ValueError without a configured server or a file, and for a server database that
    is not empty; DataDirectoryInUse; StorageError.
    """
    path = Path(data_dir).absolute() / DATABASE_NAME
    if config.database is None or not path.exists():
        missing = "memory.database is not set" if config.database is None else f"there is no {str(path)!r}"
        raise ValueError(f"{missing}: name the server's database, and the data directory whose rows go there")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(take_ownership(path.parent)))
        source = stack.enter_context(contextlib.closing(open_rows(path.parent, MemoryConfig())))
        target = stack.enter_context(contextlib.closing(Database(config.database)))
        return copy_rows(source, target)


def open_rows(data_dir: Path, config: MemoryConfig) -> Database:
    """Open the database of a data directory: its SQLite file, or the configured server.

    Raises: StorageError, also when a file that existed before is missing.
    """
    database = Database(config.database) if config.database is not None else _open_file(data_dir / DATABASE_NAME)
    try:
        continue_sequence(database)
    except BaseException:
        database.close()
        raise
    return database


def _open_file(path: Path) -> Database:
    trace = DatabaseTrace(path)
    trace.check()
    database = Database(path, on_close=trace.note_closed)
    trace.note_open()  # only now: SQLite has created the log that an open record implies
    return database


def prepare_nothing(_connection: Connection) -> None:
    """Create no tables: the text index creates its own."""
