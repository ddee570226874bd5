"""Settings of memory: the database, the encoder, the size of the memory segment, and the success threshold."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class MemoryConfig(BaseModel, extra="forbid"):
    """Settings of memory. The defaults are the recommendation."""

    database: str | None = None
    """The database. None: `ratchet.db` in the data directory. Else a URL, `postgresql+psycopg://USER@HOST/NAME`; the
    password comes from PGPASSWORD, from a password file, or from a URL that is set by an environment variable."""
    encoder: str = "embedded"
    """`embedded`: all-MiniLM-L6-v2 as installed, no download. Else a sentence-transformers name or directory."""
    success_reward: float = Field(default=1.0, ge=0.0, le=1.0)
    """An episode whose reward reaches this is a success."""
    memory_tokens: int = Field(default=600, ge=0)
    """Budget of the memory segment in the prompt."""
    max_insights: int = Field(default=12, ge=0)
    """Most insights in one memory segment."""
    max_exemplars: int = Field(default=1, ge=0)
    """Most solved tasks in one memory segment."""
    max_passages: int = Field(default=3, ge=0)
    """Most passages of documents in one memory segment."""
    share_live: Literal["user", "tenant"] = "user"
    """Scope of memories of live traffic. `user`: the person of the episode, and nobody where none was named. `tenant`:
    the whole tenant."""
    max_kept_insights: int = Field(default=20, ge=1)
    """ExpeL's list size for one kind of task. From 5 over it on, REMOVE costs 3 of an insight's strength, not 1."""
    passage_tokens: int = Field(default=200, ge=20)
    """Size of a document's passages. The embedded encoder reads 256 tokens."""
    max_document_passages: int = Field(default=5_000, ge=1)
    """Most passages of one document. They are written in batches, and the document is shown when all are written."""
    retrieval_deadline_seconds: float = Field(default=0.15, gt=0)
    """Deadline of the vector index for one request; after it, memory is found by words alone."""
    encoding_deadline_seconds: float = Field(default=2.0, gt=0)
    """Deadline for encoding a request's query. A request does not wait for an encoder that is still loading."""
