"""Find rows by meaning: vectors in Chroma, an index that may be lost at any time.

This module refuses to know rows and encoders; it is given ids, vectors and filters. Chroma lives in a subdirectory
that is never reused after a failure, because the client caches what it knows of a path for the life of the process.

Invariant: whatever goes wrong in there comes out as IndexDamaged.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory.errors import IndexDamaged
from memory.schema import new_id
from memory.searchables import COLLECTIONS, Searchable

if TYPE_CHECKING:
    import numpy

DATABASE_NAME = "chroma.sqlite3"
MAX_BATCH = 200


class MeaningIndex:
    """The vectors of everything searchable, one Chroma collection each. Safe to use from many threads."""

    def __init__(self, directory: Path, encoder_name: str) -> None:
        self._directory = directory
        self._encoder_name = encoder_name
        self._home: Path | None = None
        self._client: Any = None
        self._collections: dict[str, Any] = {}
        self._lock = threading.Lock()  # opening and closing; Chroma guards the rest itself

    @property
    def is_open(self) -> bool:
        return bool(self._collections)

    def open(self) -> None:
        """Open what is there, or an empty index. What another encoder made is thrown away. Raises: IndexDamaged."""
        with self._lock, _chroma_errors():
            homes = sorted(self._directory.glob("idx_*")) if self._directory.exists() else []
            self._home = homes[-1] if homes else self._directory / new_id("idx")
            _check_file(self._home / DATABASE_NAME)
            self._client = _connect(self._home)
            collections = {name: self._collection(name) for name in COLLECTIONS}
            if any((it.metadata or {}).get("encoder") != self._encoder_name for it in collections.values()):
                for name in COLLECTIONS:
                    self._client.delete_collection(name)
                collections = {name: self._collection(name) for name in COLLECTIONS}
            self._collections = collections

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            client, self._client, self._collections = self._client, None, {}
            if client is not None:
                with contextlib.suppress(IndexDamaged), _chroma_errors():
                    client.close()

    def set_aside(self) -> None:
        """Close, and put the files out of the way, so that the next `open` begins an empty index."""
        self.close()
        for old in self._directory.glob("damaged_*"):  # one is enough to look into
            shutil.rmtree(old, ignore_errors=True)
        for home in self._directory.glob("idx_*"):
            home.rename(home.with_name(f"damaged_{home.name}"))

    def verify(self) -> None:
        """Find one stored vector in each collection. Raises: IndexDamaged when the files are gone or don't answer."""
        with _chroma_errors():
            if self._home is None or not (self._home / DATABASE_NAME).exists():
                raise IndexDamaged(f"the files of the index of meanings are gone from {str(self._directory)!r}")
            for collection in self._collections.values():
                stored = collection.get(limit=1, include=["embeddings"])
                if stored["ids"]:
                    collection.query(query_embeddings=stored["embeddings"], n_results=1, include=[])

    @property
    def is_present(self) -> bool:
        """Say whether the files of the open index still exist: Chroma itself goes on reading deleted ones."""
        return self._home is not None and (self._home / DATABASE_NAME).exists()

    def upsert(self, collection: str, entries: Sequence[Searchable], vectors: numpy.ndarray) -> None:
        """Hold the entries with their vectors, (num_entries, dim) float32: idempotent. Raises: IndexDamaged."""
        with _chroma_errors():
            for start in range(0, len(entries), MAX_BATCH):
                batch = entries[start : start + MAX_BATCH]
                self._open_collection(collection).upsert(
                    ids=[entry.row_id for entry in batch],
                    embeddings=vectors[start : start + MAX_BATCH],
                    metadatas=[_metadata(entry) for entry in batch],
                )

    def forget(self, collection: str, row_ids: Iterable[str]) -> None:
        """Hold none of these any more: idempotent. Raises: IndexDamaged."""
        row_ids = list(row_ids)
        with _chroma_errors():
            for start in range(0, len(row_ids), MAX_BATCH):
                self._open_collection(collection).delete(ids=row_ids[start : start + MAX_BATCH])

    def find(
        self,
        collection: str,
        vector: numpy.ndarray,
        where: Mapping[str, str],
        num: int,
        *,
        exclude_task: str | None = None,
        min_similarity: float = -1.0,
    ) -> list[str]:
        """Return the ids of the nearest rows, best first, by cosine similarity. Raises: IndexDamaged."""
        with _chroma_errors():
            found = self._open_collection(collection).query(
                query_embeddings=[vector], n_results=num, where=_where(where, exclude_task), include=["distances"]
            )
        hits = zip(found["ids"][0], found["distances"][0], strict=True)
        return [row_id for row_id, distance in hits if 1.0 - distance >= min_similarity]

    def digests(self, collection: str) -> dict[str, str]:
        """Return what is held: the digest of each row, by id. Raises: IndexDamaged."""
        with _chroma_errors():
            held = self._open_collection(collection).get(include=["metadatas"])
        return {row_id: kept["digest"] for row_id, kept in zip(held["ids"], held["metadatas"], strict=True)}

    def count(self) -> dict[str, int]:
        """Return how many rows of each collection are held. Raises: IndexDamaged."""
        with _chroma_errors():
            return {name: self._open_collection(name).count() for name in COLLECTIONS}

    def _open_collection(self, name: str) -> Any:
        collection = self._collections.get(name)
        if collection is None:
            raise IndexDamaged("the index of meanings is not open")
        return collection

    def _collection(self, name: str) -> Any:
        return self._client.get_or_create_collection(
            name,
            embedding_function=None,  # Chroma's own would be downloaded
            configuration={"hnsw": {"space": "cosine"}},
            metadata={"encoder": self._encoder_name},
        )


def _connect(home: Path) -> Any:
    import chromadb  # seconds to import: only here
    from chromadb.config import Settings

    home.mkdir(parents=True, exist_ok=True)
    return chromadb.PersistentClient(path=str(home), settings=Settings(anonymized_telemetry=False))


def _check_file(path: Path) -> None:
    """Have SQLite look at Chroma's file first: the client opens damaged ones and fails on its own threads later."""
    if not path.exists():
        return
    connection = sqlite3.connect(path)
    try:
        verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.Error as error:
        raise IndexDamaged(f"{str(path)!r} is damaged: {error}") from error
    finally:
        connection.close()
    if verdict != "ok":
        raise IndexDamaged(f"{str(path)!r} is damaged: {verdict}")


def _metadata(entry: Searchable) -> dict[str, str]:
    place = {"tenant": entry.tenant, "environment": entry.environment, "kind": entry.kind, "task": entry.task}
    return place | {"digest": entry.digest}


def _where(where: Mapping[str, str], exclude_task: str | None) -> dict[str, Any] | None:
    conditions: list[dict[str, Any]] = [{name: value} for name, value in where.items()]
    if exclude_task:
        conditions.append({"task": {"$ne": exclude_task}})
    if len(conditions) > 1:
        return {"$and": conditions}
    return conditions[0] if conditions else None


@contextlib.contextmanager
def _chroma_errors() -> Iterator[None]:
    """Turn anything that comes out of Chroma into IndexDamaged.

    The catch is as broad as catches get, on purpose: the client raises its own errors, SQLite's and plain ones, and
    a panic in its Rust half arrives as a BaseException. None of them may cost an answer.
    """
    try:
        yield
    except (IndexDamaged, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise IndexDamaged(f"the index of meanings failed: {type(error).__name__}: {error}") from error
