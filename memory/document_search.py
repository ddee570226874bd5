"""Search of documents for people and programs, with the document that each passage comes from.

The texts are returned as they were written: a caller that puts one into a prompt must neutralise it first.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlmodel import col, select

from memory.database import Database
from memory.index import MemoryIndex
from memory.schema import Document, Passage

# Cosine. Lower than a prompt should demand: a person who searches reads the list and sees what is far off.
MIN_SIMILARITY = 0.3


@dataclass(frozen=True)
class DocumentMatch:
    """A passage that fits a query, and the document it is from."""

    document_id: str
    title: str
    text: str
    score: float
    """Of reciprocal rank fusion: comparable within one search, not between two."""


async def search_documents(
    database: Database, index: MemoryIndex, query: str, limit: int, *, tenant: str = ""
) -> list[DocumentMatch]:
    """Return the passages of a tenant's documents that fit the query, best first.

    Raises: StorageError.
    """
    found = await index.find("passages", query, num=limit, tenant=tenant, min_similarity=MIN_SIMILARITY)
    ids = [row_id for row_id, _ in found]
    rows = select(Passage.id, Passage.text, Document.id, Document.title)
    rows = rows.join(Document, col(Document.id) == Passage.document_id)
    # The index may be behind the rows: whose they are is asked again.
    rows = rows.where(Document.tenant == tenant, col(Document.is_whole), col(Passage.id).in_(ids))
    with database.read() as session:
        passages = {row_id: (document_id, title, text) for row_id, text, document_id, title in session.exec(rows)}
    return [DocumentMatch(*passages[row_id], score) for row_id, score in found if row_id in passages]
