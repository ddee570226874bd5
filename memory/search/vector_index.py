"""Similarity search over vectors in Chroma, an index that may be lost at any time.

A tenant partition has the rows of one environment and kind that a whole tenant is shown. A large one is a Chroma
collection of its own, because Chroma answers a filter by first listing every row that passes, which takes seconds
among a million. All small ones, and the rows of single persons, lie together in one shared Chroma collection: each
Chroma collection takes four open files and some 3 MB, and there may be thousands of tenants. The shared one is never
searched by Chroma; callers name the rows, and their vectors are compared here. A small partition moves to a collection
of its own when it has grown beyond `MAX_COMPARED` rows, while there are fewer than `MAX_LARGE` of those; after that,
only its newest rows are compared.

Invariant: every failure of Chroma is raised as IndexDamaged. Hazard: Chroma's client caches the state of a path for the
life of the process, so its subdirectory is never reused after a failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import resource
import shutil
import sqlite3
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory.errors import IndexDamaged
from memory.schema import new_id
from memory.search.indexed_rows import COLLECTIONS, IndexedRow, IndexQuery

if TYPE_CHECKING:
    import numpy
    from chromadb import Collection
    from chromadb.api import ClientAPI

DATABASE_NAME = "chroma.sqlite3"
MAX_BATCH = 200
SPARE = 10  # rows requested beyond those wanted, because some of the nearest may be of the excluded task
MAX_LARGE = 256  # partitions with a Chroma collection of their own, of each of `COLLECTIONS`
MAX_OPEN_COLLECTIONS = 1_000_000  # in effect no limit: `MAX_LARGE` bounds them
PAGE = 20_000  # digests of one read
# With each write Chroma reads all rows since its last save again, by default up to 1,000 of them, and the allocator
# keeps that memory: a megabyte for each 35 rows. A save costs in proportion to the rows since the last one.
SAVES = {"batch_size": 100, "sync_threshold": 100}
# Chroma's default ef_search of 100 finds 85 of the 100 nearest among a million rows in tight clusters; 800 finds 98 for
# 1 ms more.
HNSW = {"space": "cosine", "ef_search": 800, **SAVES}
SHARED_HNSW = {"space": "cosine", "ef_construction": 10, "max_neighbors": 4, **SAVES}  # never searched: cheap to add to
MAX_COMPARED = 256  # rows of a small partition; Chroma takes 30 us to read the vector of each
LAYOUT = 6  # version of the layout described above: an index of another version is built anew
TENANT_COLUMNS = ("tenant", "environment", "kind")
TenantPartition = tuple[str, str, str]
"""The values of `TENANT_COLUMNS`."""
SHARED = None
"""The key of the shared Chroma collection; the others' keys are tenant partitions."""
NewestIds = Callable[[TenantPartition, int], Sequence[str]]
"""(partition, limit) -> ids of its newest rows, none of them a single person's."""


class VectorIndex:
    """The vectors of every searchable row. Safe to use from many threads."""

    def __init__(self, directory: Path, encoder_name: str) -> None:
        self._directory = directory
        self._encoder_name = encoder_name
        self._home: Path | None = None
        self._client: ClientAPI | None = None
        self._chroma: dict[str, dict[TenantPartition | None, Collection]] = {}  # by collection, then by key
        self._num_bytes = 0  # size of Chroma's database at the last check
        self._lock = threading.Lock()  # for opening and closing; Chroma itself is thread-safe

    @property
    def is_open(self) -> bool:
        """Whether the index can be searched."""
        return bool(self._chroma)

    def open(self) -> None:
        """Open the existing index, or an empty one. Vectors of another encoder are deleted. Raises: IndexDamaged."""
        with self._lock, _chroma_errors():
            # Ids sort by time: the last directory is the newest.
            homes = sorted(self._directory.glob("idx_*")) if self._directory.exists() else []
            self._home = homes[-1] if homes else self._directory / new_id("idx")
            _check_file(self._home / DATABASE_NAME)
            self._client = _connect(self._home)
            opened: dict[str, dict[TenantPartition | None, Collection]] = {name: {} for name in COLLECTIONS}
            for chroma in self._client.list_collections():
                metadata: dict[str, Any] = dict(chroma.metadata or {})
                if (metadata.get("encoder"), metadata.get("layout")) != (self._encoder_name, LAYOUT):
                    self._client.delete_collection(chroma.name)
                else:
                    key = SHARED if metadata["is_shared"] else _partition_in(metadata)
                    opened[metadata["collection"]][key] = chroma
            self._chroma, self._num_bytes = opened, 0

    def close(self) -> None:
        """Close the index and its files."""
        with self._lock:
            client, self._client, self._chroma = self._client, None, {}
            if client is not None:
                with contextlib.suppress(IndexDamaged), _chroma_errors():
                    client.close()  # pyright: ignore[reportAttributeAccessIssue] (of the implementation only)

    def set_aside(self) -> None:
        """Close the index and move its files away, so that the next `open` begins an empty one."""
        self.close()
        for old in self._directory.glob("damaged_*"):  # one damaged copy is enough for a post-mortem
            shutil.rmtree(old, ignore_errors=True)
        for home in self._directory.glob("idx_*"):
            home.rename(home.with_name(f"damaged_{home.name}"))

    def verify(self) -> None:
        """Search for one stored vector in each Chroma collection.

        Raises: IndexDamaged when the files are gone or the search fails.
        """
        with _chroma_errors():
            if not self.is_whole:
                raise IndexDamaged(f"files of the vector index are missing from {str(self._directory)!r}, or truncated")
            for chroma in [chroma for name in COLLECTIONS for chroma in self._all(name).values()]:
                stored = chroma.get(limit=1, include=["embeddings"])
                if stored["ids"]:
                    chroma.query(query_embeddings=stored["embeddings"], n_results=1, include=[])

    @property
    def is_whole(self) -> bool:
        """Whether the files of the open index exist and have not shrunk: Chroma itself does not notice a loss."""
        try:
            num_bytes = (self._home / DATABASE_NAME).stat().st_size if self._home else 0
        except OSError:
            return False
        # Each check sets the size that the next one compares with.
        last_num_bytes, self._num_bytes = self._num_bytes, num_bytes
        return 0 < num_bytes >= last_num_bytes

    def upsert(
        self,
        collection: str,
        rows: Sequence[IndexedRow],
        vectors: Sequence[numpy.ndarray],
        *,
        newest_ids: NewestIds | None = None,
    ) -> None:
        """Store the rows with their vectors, (dim,) float32 each. Idempotent.

        `newest_ids` is asked for the size of a partition; without it every partition counts as large.
        Raises: IndexDamaged.
        """
        by_key: dict[TenantPartition | None, list[int]] = defaultdict(list)
        with _chroma_errors():
            partitions = {_tenant_partition(row) for row in rows}
            keys = {partition: self._key_of(collection, partition, newest_ids) for partition in partitions}
            for position, row in enumerate(rows):
                by_key[keys[_tenant_partition(row)]].append(position)
            for key, positions in by_key.items():
                chroma = self._get_or_create(collection, key)
                for start in range(0, len(positions), MAX_BATCH):
                    batch = positions[start : start + MAX_BATCH]
                    # A row may have become one person's, or the whole tenant's, and lie elsewhere still.
                    self._delete_elsewhere(collection, key, [rows[position] for position in batch])
                    chroma.upsert(
                        ids=[rows[position].row_id for position in batch],
                        embeddings=[vectors[position] for position in batch],
                        metadatas=[_metadata(rows[position]) for position in batch],
                    )

    def _key_of(
        self, collection: str, partition: TenantPartition | None, newest_ids: NewestIds | None
    ) -> TenantPartition | None:
        """Return the key of a partition's Chroma collection; a partition that has outgrown the shared one moves first.

        The partition `None` stands for the rows of single persons.
        """
        if partition is None or self.is_large(collection, partition) or newest_ids is None:
            return partition
        if len(newest_ids(partition, MAX_COMPARED + 1)) <= MAX_COMPARED or self._num_large(collection) >= MAX_LARGE:
            return SHARED
        self._move(collection, partition, newest_ids(partition, sys.maxsize))
        return partition

    def _move(self, collection: str, partition: TenantPartition, row_ids: Sequence[str]) -> None:
        """Move a partition's rows from the shared Chroma collection to one of its own.

        Order: copy, publish, delete. A process that dies in between leaves rows behind in the shared one, and
        `digests` deletes them at the next start.
        """
        shared, own = self._chroma[collection].get(SHARED), self._create(collection, partition)
        batches = [row_ids[start : start + MAX_BATCH] for start in range(0, len(row_ids), MAX_BATCH)]
        for batch in batches:
            stored = shared.get(ids=list(batch), include=["embeddings", "metadatas"]) if shared is not None else None
            if stored is not None and stored["ids"]:
                own.upsert(ids=stored["ids"], embeddings=stored["embeddings"], metadatas=stored["metadatas"])
        self._chroma[collection][partition] = own  # searched instead of the shared one from here on
        for batch in batches:
            if shared is not None:
                _delete(shared, batch)

    def _delete_elsewhere(self, collection: str, key: TenantPartition | None, rows: Sequence[IndexedRow]) -> None:
        """Delete rows from the Chroma collection that may have held them before."""
        by_other: dict[TenantPartition | None, list[str]] = defaultdict(list)
        for row in rows:
            by_other[_partition_of(row) if key is SHARED else SHARED].append(row.row_id)
        for other, row_ids in by_other.items():
            if (chroma := self._chroma[collection].get(other)) is not None:
                _delete(chroma, row_ids)

    def forget(self, collection: str, row_ids: Iterable[str]) -> None:
        """Delete these rows. Idempotent. Raises: IndexDamaged."""
        row_ids = list(row_ids)
        with _chroma_errors():
            for start in range(0, len(row_ids), MAX_BATCH):
                for chroma in self._all(collection).values():
                    _delete(chroma, row_ids[start : start + MAX_BATCH])

    def is_large(self, collection: str, partition: TenantPartition) -> bool:
        """Return whether a partition has a Chroma collection of its own, and is searched without row ids."""
        return partition in self._chroma.get(collection, ())

    def _num_large(self, collection: str) -> int:
        return sum(key is not SHARED for key in self._chroma.get(collection, ()))

    def find(
        self, query: IndexQuery, vector: numpy.ndarray, *, compared: Sequence[str] = ()
    ) -> list[tuple[str, float]]:
        """Return (row id, cosine similarity) of the nearest rows, best first.

        The search covers the large partitions that the query's filter matches, and the rows `compared`, which are one
        person's or of small partitions. `vector` is the query's, (dim,) float32. Raises: IndexDamaged.
        """
        with _chroma_errors():
            large = self._matching(query.collection, query.where)
            hits = [_nearest(chroma, vector, query.num, query.exclude_task) for chroma in large]
            shared = self._chroma[query.collection].get(SHARED)
            if shared is not None and compared:
                hits.append(_compare(shared, vector, compared))
        nearest = heapq.nsmallest(query.num, (hit for of_one in hits for hit in of_one))
        return [(row_id, 1.0 - distance) for distance, row_id in nearest]

    def compare(self, query: IndexQuery, vector: numpy.ndarray, row_ids: Sequence[str]) -> list[tuple[str, float]]:
        """Return (row id, cosine similarity) of those of the rows that the index holds. Raises: IndexDamaged."""
        with _chroma_errors():
            shared = self._all(query.collection).get(SHARED)
            searched = [*self._matching(query.collection, query.where), *([] if shared is None else [shared])]
            hits = [hit for chroma in searched for hit in _compare(chroma, vector, row_ids)]
        return [(row_id, 1.0 - distance) for distance, row_id in hits]

    def digests(self, collection: str) -> dict[str, str]:
        """Return the digest of each row that the index holds, by row id. Raises: IndexDamaged.

        Deletes the rows that an interrupted move left behind.
        """
        digests: dict[str, str] = {}
        left_behind: list[str] = []
        with _chroma_errors():
            for key, chroma in self._all(collection).items():
                # pages by offset hold only while nobody writes: the sync thread, which calls this, is the only writer
                for start in range(0, chroma.count(), PAGE):
                    page = chroma.get(limit=PAGE, offset=start, include=["metadatas"])
                    for row_id, metadata in zip(page["ids"], page["metadatas"] or (), strict=True):
                        if key is SHARED and self._is_left_behind(collection, metadata):
                            left_behind.append(row_id)
                        else:
                            digests[row_id] = str(metadata["digest"])
            for start in range(0, len(left_behind), MAX_BATCH):
                _delete(self._chroma[collection][SHARED], left_behind[start : start + MAX_BATCH])
        return digests

    def _is_left_behind(self, collection: str, metadata: Mapping[str, Any]) -> bool:
        return not metadata["is_own"] and self.is_large(collection, _partition_in(metadata))

    def count(self) -> dict[str, int]:
        """Return the number of rows that the index holds, by collection. Raises: IndexDamaged."""
        with _chroma_errors():
            return {name: sum(chroma.count() for chroma in self._all(name).values()) for name in COLLECTIONS}

    def _all(self, collection: str) -> dict[TenantPartition | None, Collection]:
        """Return all Chroma collections of one collection, by key, the shared one included."""
        if not self._chroma:
            raise IndexDamaged("the vector index is not open")
        return self._chroma[collection].copy()

    def _matching(self, collection: str, where: Mapping[str, str]) -> list[Collection]:
        """Return the Chroma collections of the large partitions that a filter matches."""
        wanted = [(position, where[name]) for position, name in enumerate(TENANT_COLUMNS) if name in where]
        return [
            chroma
            for key, chroma in self._all(collection).items()
            if key is not None and all(key[position] == value for position, value in wanted)
        ]

    def _get_or_create(self, collection: str, key: TenantPartition | None) -> Collection:
        chroma = self._all(collection).get(key)
        if chroma is None:
            chroma = self._chroma[collection][key] = self._create(collection, key)
        return chroma

    def _create(self, collection: str, key: TenantPartition | None) -> Collection:
        if self._client is None:
            raise IndexDamaged("the vector index is not open")
        metadata: dict[str, Any] = {
            "encoder": self._encoder_name,
            "layout": LAYOUT,
            "collection": collection,
            "is_shared": key is SHARED,
            **dict(zip(TENANT_COLUMNS, key or ("", "", ""), strict=True)),
        }
        name = hashlib.sha256(json.dumps([collection, key]).encode()).hexdigest()[:40]
        return self._client.get_or_create_collection(
            f"{collection}-{name}",
            embedding_function=None,  # Chroma's default would download a model
            configuration={"hnsw": SHARED_HNSW if key is SHARED else HNSW},  # pyright: ignore[reportArgumentType]
            metadata=metadata,
        )


def _partition_of(row: IndexedRow) -> TenantPartition:
    return row.tenant, row.environment, row.kind


def _tenant_partition(row: IndexedRow) -> TenantPartition | None:
    """Return the tenant partition of a row; None for a row of a single person."""
    return None if row.user_id else _partition_of(row)


def _partition_in(metadata: Mapping[str, Any]) -> TenantPartition:
    return metadata["tenant"], metadata["environment"], metadata["kind"]


def _metadata(row: IndexedRow) -> dict[str, str | bool]:
    fields: dict[str, str | bool] = {"task": row.task, "digest": row.digest, "is_own": bool(row.user_id)}
    return fields | dict(zip(TENANT_COLUMNS, _partition_of(row), strict=True))


def _pad(row_ids: Sequence[str]) -> list[str]:
    """Return the ids and as many that no row has as make their number a power of two.

    Chroma prepares an SQL statement for each number of ids and keeps a hundred on each connection, tens of megabytes in
    all; a process whose persons collect memories would meet a new number for hours.
    """
    num_padded = 1 << max(0, len(row_ids) - 1).bit_length()
    return [*row_ids, *(f"~{number}" for number in range(num_padded - len(row_ids)))]


def _delete(chroma: Collection, row_ids: Sequence[str]) -> None:
    present = chroma.get(ids=_pad(row_ids), include=[])["ids"]
    if present:
        chroma.delete(ids=present)


def _compare(chroma: Collection, vector: numpy.ndarray, row_ids: Sequence[str]) -> list[tuple[float, str]]:
    """Return (distance, row id) of those of the rows that a Chroma collection holds."""
    import numpy

    stored = chroma.get(ids=_pad(row_ids), include=["embeddings"])
    if not stored["ids"]:
        return []
    vectors = numpy.asarray(stored["embeddings"], dtype="float32")  # (num_rows, dim)
    # normalised here, whatever length the encoder gave and Chroma kept
    norms = numpy.linalg.norm(vectors, axis=1) * numpy.linalg.norm(vector)
    similarities = vectors @ vector / numpy.maximum(norms, 1e-12)
    return [(1.0 - float(it), row_id) for it, row_id in zip(similarities, stored["ids"], strict=True)]


def _nearest(chroma: Collection, vector: numpy.ndarray, num: int, exclude_task: str | None) -> list[tuple[float, str]]:
    """Return (distance, row id) of the nearest rows of one partition, requesting more while too many are excluded."""
    num_requested = num + SPARE if exclude_task else num
    while True:
        result: Any = chroma.query(
            query_embeddings=[vector],
            n_results=num_requested,
            include=["distances", "metadatas"] if exclude_task else ["distances"],
        )
        hits = list(zip(result["distances"][0], result["ids"][0], strict=True))
        if not exclude_task:
            return hits
        metadatas = result["metadatas"][0]
        kept = [hit for hit, metadata in zip(hits, metadatas, strict=True) if metadata["task"] != exclude_task]
        if len(kept) >= num or len(hits) < num_requested:
            return kept[:num]
        num_requested *= 4


def _connect(home: Path) -> ClientAPI:
    import chromadb  # takes seconds to import
    from chromadb.config import Settings

    home.mkdir(parents=True, exist_ok=True)
    client = chromadb.PersistentClient(path=str(home), settings=Settings(anonymized_telemetry=False))
    # A Chroma collection has four files open and takes some 3 MB. Chroma closes the least recently used ones when
    # there are more than a fifth of the files that the process may open, and one with unsaved rows then fails to be
    # read ("Nothing found on disk"). So the limit on open files is raised and no collection is ever closed. Chroma has
    # no setting for its cache size, and its Rust half reads the attribute at its start: hence the restart.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # private attributes of Chroma 1.5.9: check them when the pin moves
    server: Any = client._server  # pyright: ignore[reportAttributeAccessIssue]
    server.stop()
    server.hnsw_cache_size = MAX_OPEN_COLLECTIONS
    server.start()
    return client


def _check_file(path: Path) -> None:
    """Check Chroma's database with SQLite: Chroma opens a damaged one and fails on its own threads later.

    Raises: IndexDamaged.
    """
    if not path.exists():
        return
    connection = sqlite3.connect(path)
    try:
        problem = connection.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.Error as error:
        raise IndexDamaged(f"{str(path)!r} is damaged: {error}") from error
    finally:
        connection.close()
    if problem != "ok":
        raise IndexDamaged(f"{str(path)!r} is damaged: {problem}")


@contextlib.contextmanager
def _chroma_errors() -> Iterator[None]:
    """Raise every failure of Chroma as IndexDamaged.

    The broad `except` is deliberate: Chroma raises its own errors, SQLite's and built-in ones, and a panic in its Rust
    half arrives as a BaseException. None of them may fail a request.
    """
    try:
        yield
    except (IndexDamaged, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise IndexDamaged(f"the vector index failed: {type(error).__name__}: {error}") from error
