"""Semantic memory to read from: documents, split along their own structure into passages small enough to show.

This module refuses to know how passages are found. Invariants: a title names one document of a tenant; a document is
replaced as a whole, in one transaction, and only when its content changed.
"""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sqlalchemy import delete, insert, literal
from sqlmodel import Session, col, select

from memory.database import Database
from memory.errors import DocumentTooLong, UnknownDocument
from memory.schema import Document, Outbox, Passage, Trust, new_id

CHARS_PER_TOKEN = 4  # of English prose, about; the encoder's own tokenizer is not asked
WRITE_BATCH = 1000
BREAKS = (
    re.compile(r"\n(?=#{1,6} )"),  # Markdown headings
    re.compile(r"\n\s*\n"),  # paragraphs
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?])\s+"),  # sentences
    re.compile(r"\s+"),
)


class Documents:
    """All documents the agent was given to read."""

    def __init__(self, database: Database, *, passage_tokens: int = 200, max_passages: int = 5_000) -> None:
        self._database = database
        self._passage_chars = passage_tokens * CHARS_PER_TOKEN
        self._max_passages = max_passages

    async def ingest(
        self, title: str, content: str | Path, *, tenant: str = "", trust: Trust = Trust.TRUSTED
    ) -> Document:
        """Keep a document, given as text or as a UTF-8 file; return the row. The same content again changes nothing but
        its trust.

        Raises: ValueError for a blank title, an empty document or a file that isn't UTF-8 text; DocumentTooLong for
        more passages than are allowed; OSError when it can't be read.
        """
        title = " ".join(title.split())
        if not title:
            raise ValueError("a document needs a title: name it after what it tells")
        text = await asyncio.to_thread(_read, content) if isinstance(content, Path) else content
        passages = await asyncio.to_thread(self._split, title, text)  # seconds of work for the longest
        if not passages:
            raise ValueError(f"document {title!r} holds no text: check {str(content)[:80]!r}")
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

        def write(session: Session) -> Document:
            theirs = select(Document).where(Document.tenant == tenant)
            known = session.exec(theirs.where(Document.digest == digest)).first()
            if known is not None:
                known.trust = trust
                session.add(known)
                session.flush()
                return known
            replaced = session.exec(theirs.where(Document.title == title)).first()
            if replaced is not None:
                _remove(session, replaced)
            document = Document(id=new_id("doc"), tenant=tenant, title=title, digest=digest, trust=trust)
            return _add(session, document, passages)

        return await self._database.write(write)

    def _split(self, title: str, text: str) -> builtins.list[str]:
        """Return the passages of a text, reading no further than to one too many. Raises: DocumentTooLong."""
        passages = builtins.list(islice(split_text(text, self._passage_chars), self._max_passages + 1))
        if len(passages) > self._max_passages:
            raise DocumentTooLong(
                f"document {title!r} has more than {self._max_passages} passages: cut it into several documents, or "
                "raise memory.max_document_passages"
            )
        return passages

    async def remove(self, document_id: str, *, tenant: str = "") -> None:
        """Forget a document and its passages. Raises: UnknownDocument."""
        await self._database.write(lambda session: _remove(session, _require(session, document_id, tenant)))

    def get(self, document_id: str, *, tenant: str = "") -> Document:
        """Return one document. Raises: UnknownDocument, also for another tenant's."""
        with self._database.read() as session:
            return _require(session, document_id, tenant)

    def passages(self, document_id: str, *, tenant: str = "") -> builtins.list[Passage]:
        """Return a document's passages in order. Raises: UnknownDocument."""
        with self._database.read() as session:
            _require(session, document_id, tenant)
            return builtins.list(session.exec(_passages_of(document_id)))

    def list(self, *, tenant: str = "") -> builtins.list[Document]:
        """Return all documents of a tenant, by title."""
        query = select(Document).where(Document.tenant == tenant)
        with self._database.read() as session:
            return builtins.list(session.exec(query.order_by(col(Document.title))))


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Yield passages of at most `max_chars`, cut at the coarsest breaks that do: headings, paragraphs, ..., words."""
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
    """Yield the parts of `text` between breaks, breaking only what is too long still, and only as finely as needed."""
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
    """Join the parts of one level again as far as they fit: sentences and words make poor passages alone."""
    if breaks[0] in BREAKS[:2]:
        yield from parts
        return
    glue, held = ("\n" if breaks[0] is BREAKS[2] else " "), ""
    for part in parts:
        joined = f"{held}{glue}{part}" if held else part
        if held and len(joined) > max_chars:
            yield held
            held = part
        else:
            held = joined
    if held:
        yield held


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: convert it to text first") from error


def _add(session: Session, document: Document, passages: builtins.list[str]) -> Document:
    session.add(document)
    session.flush()  # the passages point at it
    for start in range(0, len(passages), WRITE_BATCH):
        batch = enumerate(passages[start : start + WRITE_BATCH], start)
        rows = [{"id": new_id("psg"), "document_id": document.id, "position": at, "text": text} for at, text in batch]
        session.execute(insert(Passage), rows)
    session.execute(_announce(document.id, is_removed=False))
    return document


def _remove(session: Session, document: Document) -> None:
    session.execute(_announce(document.id, is_removed=True))
    session.execute(delete(Passage).where(col(Passage.document_id) == document.id))
    session.delete(document)
    session.flush()  # its title is free again for the one that takes its place


def _announce(document_id: str, *, is_removed: bool):
    """Return the statement that has the index look at all passages of a document."""
    passages = select(literal("passages"), Passage.id, literal(is_removed), literal(False))
    passages = passages.where(col(Passage.document_id) == document_id).order_by(col(Passage.position))
    return insert(Outbox).from_select(["collection", "row_id", "is_removed", "is_worded"], passages)


def _passages_of(document_id: str):
    return select(Passage).where(Passage.document_id == document_id).order_by(col(Passage.position))


def _require(session: Session, document_id: str, tenant: str) -> Document:
    document = session.get(Document, document_id)
    if document is None or document.tenant != tenant:
        raise UnknownDocument(f"no document has the id {document_id!r}: list them to see which exist")
    return document
