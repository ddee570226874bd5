"""Search of documents for people and programs, with the document that each passage comes from.

Hazard: texts are returned as they were written. A caller that puts one into a prompt must neutralise it first.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory.records.documents import read_passages
from memory.search.index import MemoryIndex
from memory.search.relevance import MIN_SIMILARITY
from memory.storage.database import Database


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
    ranked = await index.find("passages", query, num=limit, tenant=tenant, min_similarity=MIN_SIMILARITY)
    with database.read() as session:
        passages = read_passages(session, [row_id for row_id, _ in ranked], tenant)
    return [
        DocumentMatch(passage.document_id, passage.title, passage.text, score)
        for row_id, score in ranked
        if (passage := passages.get(row_id)) is not None
    ]
