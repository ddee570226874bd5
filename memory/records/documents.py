"""Semantic memory in documents, split along their own structure into passages small enough to show.

Passages are written and deleted in batches, so that other writes are not delayed. Meanwhile the document's row is
hidden (`is_whole` is false); one short transaction then shows the new document and hides the old one.

Invariants: a title names one document of a tenant; a document is replaced as a whole, and only when its content has
changed. Hazard: every query for documents or passages must leave hidden ones out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import CursorResult, Insert, delete, insert, literal, update
from sqlalchemy import select as sql_select
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from memory.errors import DocumentTooLong, StorageError, UnknownDocument
from memory.schema import Document, Outbox, Passage, Trust, new_id
from memory.storage.database import Database

CHARS_PER_TOKEN = 4  # approximate, for English prose
WRITE_BATCH = 250  # passages of one transaction; other writes wait for it
BREAKS = (
    re.compile(r"\n(?=#{1,6} )"),  # Markdown headings
    re.compile(r"\n\s*\n"),  # paragraphs
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?])\s+"),  # sentences
    re.compile(r"\s+"),
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_running: set[asyncio.Task] = set()


class PassageOfDocument(NamedTuple):
    """A passage with the title and trust of its document."""

    id: str
    text: str
    document_id: str
    title: str
    trust: Trust


class Documents:
    """All documents that were given to the agent."""

    def __init__(self, database: Database, *, passage_tokens: int = 200, max_passages: int = 5_000) -> None:
        self._database = database
        self._passage_chars = passage_tokens * CHARS_PER_TOKEN
        self._max_passages = max_passages

    async def ingest(
        self, title: str, content: str | Path, *, tenant: str = "", trust: Trust = Trust.TRUSTED
    ) -> Document:
        """Store a document, given as text or as the path of a UTF-8 file; return its row.

        The same content again, under any title, changes nothing but the trust: the document that has it is returned
        under its own title. Raises: ValueError for a blank title, an empty document or
        a file that is not UTF-8 text; DocumentTooLong for more passages than are allowed; OSError for an unreadable
        file.
        """
        title = " ".join(title.split())
        if not title:
            raise ValueError("a document needs a title: name its subject")
        text = await asyncio.to_thread(_read, content) if isinstance(content, Path) else content
        passages = await asyncio.to_thread(self._split, title, text)  # takes seconds for the longest
        if not passages:
            raise ValueError(f"document {title!r} holds no text: check {str(content)[:80]!r}")
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

        new = Document(id=new_id("doc"), tenant=tenant, title=title, digest=digest, trust=trust)
        return await _uncancelled(self._write(new, passages))

    async def _write(self, new: Document, passages: list[str]) -> Document:
        """Write a document, hidden until it is whole; return it, or an existing one with the same content."""
        known = await self._database.write(lambda session: _find_known(session, new) or _add_hidden(session, new))
        if known is not None:
            return known
        try:
            for start in range(0, len(passages), WRITE_BATCH):
                batch = enumerate(passages[start : start + WRITE_BATCH], start)
                rows = [{"id": new_id("psg"), "document_id": new.id, "position": at, "text": it} for at, it in batch]
                await self._database.write(partial(_insert_passages, rows=rows))
            shown, hidden_id = await self._database.write(partial(_publish, new=new))
        except StorageError:
            with contextlib.suppress(StorageError):  # `delete_unfinished` deletes it at the next start
                await self._delete(new.id)
            raise
        if hidden_id is not None:
            await self._delete(hidden_id)
        return shown

    async def _hide_and_delete(self, document_id: str, tenant: str) -> None:
        await self._database.write(lambda session: _hide(session, _require(session, document_id, tenant)))
        await self._delete(document_id)

    async def _delete(self, hidden_id: str) -> None:
        while not await self._database.write(partial(_delete_batch, hidden_id=hidden_id)):
            pass

    def delete_unfinished(self) -> None:
        """Delete the hidden documents of a process that ended while it wrote or deleted them. Blocks."""
        with self._database.read() as session:
            hidden_ids = session.exec(select(Document.id).where(col(Document.is_whole).is_(False))).all()
        for hidden_id in hidden_ids:
            while not self._database.write_sync(partial(_delete_batch, hidden_id=hidden_id)):
                pass

    def _split(self, title: str, text: str) -> list[str]:
        """Return the passages of a text. Raises: DocumentTooLong, as soon as there is one too many."""
        passages = list(islice(split_text(text, self._passage_chars), self._max_passages + 1))
        if len(passages) > self._max_passages:
            raise DocumentTooLong(
                f"document {title!r} has more than {self._max_passages} passages: split it into several documents, or "
                "raise memory.max_document_passages"
            )
        return passages

    async def remove(self, document_id: str, *, tenant: str = "") -> None:
        """Delete a document and its passages. Raises: UnknownDocument."""
        await _uncancelled(self._hide_and_delete(document_id, tenant))

    def get(self, document_id: str, *, tenant: str = "") -> Document:
        """Return one document. Raises: UnknownDocument, also for a document of another tenant."""
        with self._database.read() as session:
            return _require(session, document_id, tenant)

    def passages(self, document_id: str, *, tenant: str = "") -> list[Passage]:
        """Return a document's passages in order. Raises: UnknownDocument."""
        with self._database.read() as session:
            _require(session, document_id, tenant)
            return list(session.exec(_passages_of(document_id)))

    def select(self, *, tenant: str = "", limit: int | None = None, offset: int = 0) -> list[Document]:
        """Return a tenant's documents by title: all of them, or a page."""
        query = _whole_of(tenant).order_by(col(Document.title)).limit(limit).offset(offset)
        with self._database.read() as session:
            return list(session.exec(query))


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Yield passages of at most `max_chars`, split at the coarsest breaks that suffice, headings first."""
    passage = ""
    for piece in _pieces(text.replace("\r\n", "\n").strip(), max_chars, BREAKS):
        starts_section = piece.startswith("#") and passage
        joined = f"{passage}\n\n{piece}" if passage else piece
        if starts_section or len(joined) > max_chars:
            if passage:
                yield passage
            passage = piece
        else:
            passage = joined
    if passage:
        yield passage


def _pieces(text: str, max_chars: int, breaks: tuple[re.Pattern, ...]) -> Iterator[str]:
    """Yield the parts of `text` between breaks; only a part that is too long is split at the next finer breaks."""
    if len(text) <= max_chars and not (breaks and breaks[0] is BREAKS[0] and BREAKS[0].search(text)):
        if text.strip():
            yield text.strip()
    elif not breaks:
        for start in range(0, len(text), max_chars):
            yield text[start : start + max_chars]
    else:
        finer = (part for part in breaks[0].split(text) if part.strip())
        for part in _packed(finer, max_chars, breaks):
            yield from _pieces(part, max_chars, breaks[1:])


def _packed(parts: Iterator[str], max_chars: int, breaks: tuple[re.Pattern, ...]) -> Iterator[str]:
    """Join neighbouring lines, sentences or words as far as they fit: alone they make poor passages."""
    if breaks[0] in BREAKS[:2]:
        yield from parts
        return
    separator, joined = ("\n" if breaks[0] is BREAKS[2] else " "), ""
    for part in parts:
        longer = f"{joined}{separator}{part}" if joined else part
        if joined and len(longer) > max_chars:
            yield joined
            joined = part
        else:
            joined = longer
    if joined:
        yield joined


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: convert it to text first") from error


async def _uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Await work of several transactions. It runs to its end even when the caller is cancelled."""
    task = asyncio.get_running_loop().create_task(work)
    _running.add(task)  # the event loop keeps only a weak reference to a task
    task.add_done_callback(_forget)
    return await asyncio.shield(task)


def _forget(task: asyncio.Task) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        # A caller that still waits gets the exception itself; reading it here avoids "exception was never retrieved".
        logger.debug("a document was not written: %s", type(error).__name__)


def _whole_of(tenant: str) -> SelectOfScalar[Document]:
    return select(Document).where(Document.tenant == tenant, col(Document.is_whole))


def _find_known(session: Session, new: Document) -> Document | None:
    """Return the existing document with the same content, if any, after setting its trust to the new one's."""
    known = session.exec(_whole_of(new.tenant).where(Document.digest == new.digest)).first()
    if known is not None:
        known.trust = new.trust
        session.add(known)
        session.flush()
    return known


def _add_hidden(session: Session, new: Document) -> None:
    values = {"id": new.id, "tenant": new.tenant, "digest": new.digest, "trust": new.trust}
    hidden = {"title": _hidden_title(new.id), "is_whole": False, "created_at": new.created_at}
    session.execute(insert(Document).values(values | hidden))


def _insert_passages(session: Session, rows: list[dict[str, Any]]) -> None:
    session.execute(insert(Passage), rows)


def _publish(session: Session, new: Document) -> tuple[Document, str | None]:
    """Show a completely written document; return (the shown document, the id of the one that is hidden now).

    Race: another call may have shown the same content meanwhile. Then the new document stays hidden.
    """
    known = _find_known(session, new)
    if known is not None:
        return known, new.id
    replaced = session.exec(_whole_of(new.tenant).where(Document.title == new.title)).first()
    if replaced is not None:  # first: (tenant, title) is unique
        _hide(session, replaced)
    document = session.get_one(Document, new.id)
    document.title, document.is_whole = new.title, True
    session.add(document)
    session.flush()
    session.execute(_queue_passages(document.id, is_removed=False))
    return document, replaced.id if replaced is not None else None


def _hide(session: Session, document: Document) -> None:
    session.execute(_queue_passages(document.id, is_removed=True))
    hidden = {"title": _hidden_title(document.id), "is_whole": False}
    session.execute(update(Document).where(col(Document.id) == document.id).values(hidden))


def _hidden_title(document_id: str) -> str:
    return f" {document_id}"  # unique: no given title begins with a space


def _delete_batch(session: Session, hidden_id: str) -> bool:
    """Delete one batch of a hidden document's passages; return whether the document itself is deleted."""
    some = select(Passage.id).where(col(Passage.document_id) == hidden_id).limit(WRITE_BATCH)
    deleted = session.execute(delete(Passage).where(col(Passage.id).in_(some)))
    if cast("CursorResult[Any]", deleted).rowcount == WRITE_BATCH:
        return False
    session.execute(delete(Document).where(col(Document.id) == hidden_id))
    return True


def _queue_passages(document_id: str, *, is_removed: bool) -> Insert:
    """Return the statement that queues all passages of a document for the index."""
    passages = select(literal("passages"), Passage.id, literal(is_removed), literal(False))
    passages = passages.where(col(Passage.document_id) == document_id).order_by(col(Passage.position))
    return insert(Outbox).from_select(["collection", "row_id", "is_removed", "is_in_text_index"], passages)


def read_passages(session: Session, passage_ids: Sequence[str], tenant: str) -> dict[str, PassageOfDocument]:
    """Return passages by id, without those of other tenants or of hidden documents.

    Results of the index must pass through here, because the index may be behind the rows.
    """
    columns = (col(Passage.id), col(Passage.text), col(Document.id), col(Document.title), col(Document.trust))
    query = sql_select(*columns)
    query = query.join(Document, col(Document.id) == Passage.document_id)
    query = query.where(col(Document.tenant) == tenant, col(Document.is_whole), col(Passage.id).in_(passage_ids))
    return {row[0]: PassageOfDocument(*row) for row in session.execute(query)}


def _passages_of(document_id: str) -> SelectOfScalar[Passage]:
    return select(Passage).where(Passage.document_id == document_id).order_by(col(Passage.position))


def _require(session: Session, document_id: str, tenant: str) -> Document:
    document = session.get(Document, document_id)
    if document is None or document.tenant != tenant or not document.is_whole:
        raise UnknownDocument(f"no document has the id {document_id!r}: list them to see which exist")
    return document
