"""Memory itself: opens everything in one data directory and hands it out.

This module refuses to know what any of it is for. Invariant: one process owns the directory, from `open` to `close`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from sqlalchemy import Connection

from memory.config import MemoryConfig
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
WORDS_NAME = "words.db"
INDEX_NAME = "chroma"


class Memory:
    """What is kept, and what finds it. Make one with `Memory.open`."""

    def __init__(self, data_dir: Path, config: MemoryConfig, encoder: Encoder, ownership: Ownership) -> None:
        self.data_dir = data_dir
        self.config = config
        self._ownership = ownership
        self.database = open_rows(data_dir, config)
        # An index lives beside the program that asks it, as Chroma does.
        is_file = self.database.kind == "sqlite"
        self._words = self.database if is_file else Database(data_dir / WORDS_NAME, prepare=leave)
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
        self.index = MemoryIndex(
            self.database, TextIndex(self._words), self.trajectories, data_dir / INDEX_NAME, encoder, config
        )
        self.retrieval = Retrieval(self.database, self.insights, self.trajectories, self.index, config)

    @classmethod
    def open(cls, data_dir: Path, config: MemoryConfig | None = None, *, encoder: Encoder | None = None) -> Memory:
        """Take the directory, bring its database up to date, and start following the rows with the index.

        Loading the encoder and Chroma goes on in a thread; until then finding is by word.
        Raises: DataDirectoryInUse, naming the owner; StorageError.
        """
        config = config or MemoryConfig()
        data_dir = Path(data_dir).absolute()
        ownership = take_ownership(data_dir)
        try:
            memory = cls(data_dir, config, encoder or SentenceEncoder(config.encoder), ownership)
        except BaseException:
            ownership.close()
            raise
        try:
            memory.documents.delete_unfinished()
        except BaseException:
            memory.close()
            raise
        memory.index.start()
        return memory

    def set_address(self, url: str) -> None:
        """Have whoever finds the directory taken told where to ask instead."""
        self._ownership.set_address(url)

    def close(self) -> None:
        """Finish what is being written, and give the directory up."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._ownership.close)
            stack.callback(self.database.close)
            stack.callback(self._words.close)
            stack.callback(self.index.close)

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def open_keys(data_dir: Path, config: MemoryConfig | None = None) -> Iterator[Keys]:
    """Take the directory for its keys alone: no encoder is loaded, no index is opened.

    Raises: DataDirectoryInUse, naming the owner; StorageError.
    """
    data_dir = Path(data_dir).absolute()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(take_ownership(data_dir)))
        yield Keys(stack.enter_context(contextlib.closing(open_rows(data_dir, config or MemoryConfig()))))


def copy_to_server(data_dir: Path, config: MemoryConfig) -> dict[str, int]:
    """Copy what the directory's own file holds into the database that the settings name; return how many rows of each
    table. The file stays as it is.

    Raises: ValueError without such a setting or without a file, and for a database that isn't empty;
    DataDirectoryInUse; StorageError.
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
    """Open the database of a data directory: the file in it, or the one elsewhere that its settings name.

    Raises: StorageError, also when a file that has been there is gone.
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
    trace.note_open()  # no sooner: now SQLite has made its log
    return database


def leave(_connection: Connection) -> None:
    """Prepare no tables: an index makes its own."""
