"""Long documents are written and deleted in batches: other writes run in between, and no half document is shown."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import func, text
from sqlmodel import col, select

from memory.config import MemoryConfig
from memory.errors import StorageError
from memory.records.documents import WRITE_BATCH, Documents
from memory.schema import Document, Outbox, Passage
from memory.search.indexed_rows import IndexedRows
from memory.storage.database import Database
from memory.store import Memory
from tests.memory.episodes import HashingEncoder
from tests.memory.storage.test_migrations import MOMENT, connect, run_revisions

LARGEST = MemoryConfig().max_document_passages
NUM_BATCHES = LARGEST // WRITE_BATCH
NOTHING = text("DELETE FROM outbox WHERE id = -1")


def long_text(word: str, num_passages: int = LARGEST) -> str:
    return "".join(f"# {word} {at}\n\n{'Some words that fill. ' * 34}\n\n" for at in range(num_passages))


class OtherWriter:
    """A tenant that writes continuously, and records the visible documents after each write."""

    def __init__(self, database: Database, look: Callable[[], None] = lambda: None) -> None:
        self._database, self._look = database, look
        self.num_writes = 0
        self.longest_cpu_seconds = 0.0
        """Most processor time that the process used during one write."""

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[OtherWriter]:
        self.num_writes = 0
        writing = asyncio.ensure_future(self._write())
        try:
            yield self
        finally:
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing

    async def _write(self) -> None:
        while True:
            began = time.process_time()
            await self._database.write(lambda session: session.execute(NOTHING))
            self.longest_cpu_seconds = max(self.longest_cpu_seconds, time.process_time() - began)
            self.num_writes += 1
            self._look()


async def test_others_write_between_the_batches_of_the_longest_document(database: Database):
    documents, other = Documents(database), OtherWriter(database)
    counts = []
    for word in ("first", "second"):  # the second replaces the first
        content = long_text(word)
        async with other.at_work():
            document = await documents.ingest("Handbook", content)
            counts.append(other.num_writes)
        assert len(documents.passages(document.id)) == LARGEST
    async with other.at_work():
        await documents.remove(document.id)
        counts.append(other.num_writes)
    assert min(counts) >= NUM_BATCHES * 0.9 and counts[1] >= 2 * NUM_BATCHES * 0.9
    assert other.longest_cpu_seconds < 0.25


async def test_a_document_is_shown_when_all_of_it_is_there(database: Database):
    documents = Documents(database, passage_tokens=20)
    searchables = IndexedRows.__new__(IndexedRows)  # no attribute is needed for passages
    seen = set()

    shown_documents = select(Document.title, func.count(col(Passage.id))).join(Passage).where(col(Document.is_whole))

    def look() -> None:
        with database.read() as session:  # one snapshot
            shown = tuple(tuple(row) for row in session.exec(shown_documents.group_by(col(Document.id))))
            seen.add((shown, sum(1 for _ in searchables.load_all(session, "passages"))))

    async with OtherWriter(database, look).at_work():
        first = await documents.ingest("Handbook", "# a\n" * 1000)
        await documents.ingest("Handbook", "# b\n" * 1500)
        await documents.remove(documents.select()[0].id)
    assert seen == {((), 0), ((("Handbook", 1000),), 1000), ((("Handbook", 1500),), 1500)}
    with database.read() as session:
        assert session.scalar(select(func.count(col(Document.id)))) == 0
        assert session.scalar(select(func.count(col(Passage.id)))) == 0
    assert first.id not in {it.id for it in documents.select()}


async def test_the_same_text_twice_at_once_is_kept_once(database: Database):
    documents = Documents(database, passage_tokens=20)
    content = "# a\n" * 1000
    one, other = await asyncio.gather(documents.ingest("One", content), documents.ingest("Other", content))
    assert one == other and documents.select() == [one]
    with database.read() as session:
        assert session.scalar(select(func.count(col(Passage.id)))) == 1000


async def test_a_document_may_be_called_like_the_id_of_one_that_is_removed(database: Database):
    documents = Documents(database)
    removed = await documents.ingest("Handbook", "How to fry.")
    named = await documents.ingest(removed.id, "How to roast.")
    await documents.remove(removed.id)
    assert documents.select() == [named]


async def test_a_document_is_written_to_its_end_when_its_caller_leaves(database: Database):
    documents = Documents(database, passage_tokens=20)
    reading = asyncio.ensure_future(documents.ingest("Handbook", "# a\n" * 1000))
    async with asyncio.timeout(30):
        while not num_rows(database, Passage):
            await asyncio.sleep(0.001)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        while not documents.select():
            await asyncio.sleep(0.001)
    assert len(documents.passages(documents.select()[0].id)) == 1000
    assert num_rows(database, Outbox) == 1000


async def test_what_a_stopped_process_left_of_a_document_is_gone_at_the_next_start(tmp_path: Path):
    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        kept = await memory.documents.ingest("Kept", "How to fry.")
        reading = asyncio.ensure_future(memory.documents.ingest("Handbook", long_text("cut off")))
        async with asyncio.timeout(30):
            while num_rows(memory.database, Passage) < 2:
                await asyncio.sleep(0.001)
        memory.database.close()
        with pytest.raises(StorageError, match="is closed"):
            await reading
    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        assert memory.documents.select() == [kept]
        assert num_rows(memory.database, Document) == num_rows(memory.database, Passage) == 1
        assert (await memory.documents.ingest("Handbook", "How to roast.")).title == "Handbook"


def test_documents_of_earlier_revisions_are_whole(location: Path | str):
    row = f"('doc_1', '', 'Handbook', 'abc', 'trusted', {MOMENT})"
    said = f"INSERT INTO documents (id, tenant, title, digest, trust, created_at) VALUES {row}"
    run_revisions(location, upgrade_to="0010")
    run_revisions(location, said, upgrade_to="0010")
    run_revisions(location, upgrade_to="0011")
    with connect(location) as connection:
        assert connection.exec_driver_sql("SELECT id FROM documents WHERE is_whole").all() == [("doc_1",)]


def num_rows(database: Database, table: type) -> int:
    with database.read() as session:
        return session.scalar(select(func.count(col(table.id))))
