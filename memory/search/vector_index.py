"""Find rows by meaning: vectors in Chroma, an index that may be lost at any time.

This module refuses to know rows and encoders; it is given ids, vectors and filters. A partition is what all of a tenant
are shown of one environment and kind. A large one is a Chroma collection of its own, because Chroma answers a filter by
first listing every row that passes, which takes seconds among a million. All small ones, and what single persons are
shown, lie together in one shared collection: each Chroma collection takes four open files and some 3 MB, and there may
be thousands of tenants. Chroma never searches the shared one; the ids of the rows are given, and their vectors are
compared here. A small partition moves to a collection of its own when it has grown beyond `MAX_COMPARED` rows. Chroma
lives in a subdirectory that is never reused after a failure, because the client caches what it knows of a path for the
life of the process.

Invariant: whatever goes wrong in there comes out as IndexDamaged.
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
from memory.search.indexed_rows import COLLECTIONS, IndexedRow

if TYPE_CHECKING:
    import numpy

DATABASE_NAME = "chroma.sqlite3"
MAX_BATCH = 200
SPARE = 10  # rows asked for beyond those wanted, where some of the nearest may be of the task that is left out
MAX_OPEN_PARTITIONS = 1_000_000  # as good as all: there is one for each few hundred rows at most
PAGE = 20_000  # digests read at once
# Chroma reads all rows since the last save again with each write, by default up to 1,000 of them, and what that takes
# stays with the allocator: a megabyte for each 35 rows. A save costs what came since the last one, not the whole.
SAVES = {"batch_size": 100, "sync_threshold": 100}
# Chroma's own 100 finds 85 of the 100 nearest among a million rows in tight clusters, this 98, for 1 ms more.
HNSW = {"space": "cosine", "ef_search": 800, **SAVES}
SHARED_HNSW = {"space": "cosine", "ef_construction": 10, "max_neighbors": 4, **SAVES}  # never searched: cheap to add to
MAX_COMPARED = 256  # rows of a small partition; to read the vector of each takes Chroma 30 us
LAYOUT = 6  # of what is in there: an index of another layout is made anew
PARTITION = ("tenant", "environment", "kind")
Partition = tuple[str, str, str]
SHARED = None
"""The place of the shared collection among those of partitions."""
IdsAt = Callable[[Partition, int], Sequence[str]]
"""The ids of up to so many rows of a partition, none of them a single person's."""


class VectorIndex:
    """The vectors of everything searchable. Safe to use from many threads."""

    def __init__(self, directory: Path, encoder_name: str) -> None:
        self._directory = directory
        self._encoder_name = encoder_name
        self._home: Path | None = None
        self._client: Any = None
        self._places: dict[str, dict[Partition | None, Any]] = {}
        self._num_bytes = 0  # of Chroma's database when it was last looked at
        self._lock = threading.Lock()  # opening and closing; Chroma guards the rest itself

    @property
    def is_open(self) -> bool:
        return bool(self._places)

    def open(self) -> None:
        """Open what is there, or an empty index. What another encoder made is thrown away. Raises: IndexDamaged."""
        with self._lock, _chroma_errors():
            homes = sorted(self._directory.glob("idx_*")) if self._directory.exists() else []
            self._home = homes[-1] if homes else self._directory / new_id("idx")
            _check_file(self._home / DATABASE_NAME)
            self._client = _connect(self._home)
            places: dict[str, dict[Partition | None, Any]] = {name: {} for name in COLLECTIONS}
            for held in self._client.list_collections():
                told = held.metadata or {}
                if (told.get("encoder"), told.get("layout")) != (self._encoder_name, LAYOUT):
                    self._client.delete_collection(held.name)
                else:
                    place = SHARED if told["is_shared"] else tuple(told[name] for name in PARTITION)
                    places[told["collection"]][place] = held
            self._places, self._num_bytes = places, 0

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            client, self._client, self._places = self._client, None, {}
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
        """Find one stored vector in each place. Raises: IndexDamaged when the files are gone or don't answer."""
        with _chroma_errors():
            if not self.is_whole:
                raise IndexDamaged(f"files of the index of meanings are gone from {str(self._directory)!r}, or cut")
            for held in [held for name in COLLECTIONS for held in self._held(name)]:
                stored = held.get(limit=1, include=["embeddings"])
                if stored["ids"]:
                    held.query(query_embeddings=stored["embeddings"], n_results=1, include=[])

    @property
    def is_whole(self) -> bool:
        """Whether the files of the open index are there, and no shorter: Chroma itself goes on with what it has."""
        try:
            num_bytes = (self._home / DATABASE_NAME).stat().st_size if self._home else 0
        except OSError:
            return False
        was, self._num_bytes = self._num_bytes, num_bytes
        return 0 < num_bytes >= was

    def upsert(
        self,
        collection: str,
        entries: Sequence[IndexedRow],
        vectors: Sequence[numpy.ndarray],
        *,
        ids_at: IdsAt | None = None,
    ) -> None:
        """Hold the entries with their vectors, (dim,) float32 each: idempotent. `ids_at` tells which partitions are
        small; without it none is. Raises: IndexDamaged."""
        by_place: dict[Partition | None, list[int]] = defaultdict(list)
        with _chroma_errors():
            wanted = {None if entry.user_id else partition_of(entry) for entry in entries}
            places = {partition: self._place_of(collection, partition, ids_at) for partition in wanted}
            for position, entry in enumerate(entries):
                by_place[places[None if entry.user_id else partition_of(entry)]].append(position)
            for place, positions in by_place.items():
                held = self._hold(collection, place)
                for start in range(0, len(positions), MAX_BATCH):
                    batch = positions[start : start + MAX_BATCH]
                    # What was one person's may have become everybody's, or the reverse.
                    self._leave_others(collection, place, [entries[position] for position in batch])
                    held.upsert(
                        ids=[entries[position].row_id for position in batch],
                        embeddings=[vectors[position] for position in batch],
                        metadatas=[_metadata(entries[position]) for position in batch],
                    )

    def _place_of(self, collection: str, partition: Partition | None, ids_at: IdsAt | None) -> Partition | None:
        """Return where a partition's rows belong, once one that has grown too large to be compared has a collection of
        its own; `None` are the rows of single persons."""
        if partition is None or self.is_large(collection, partition) or ids_at is None:
            return partition
        if len(ids_at(partition, MAX_COMPARED + 1)) <= MAX_COMPARED:
            return SHARED
        self._move(collection, partition, ids_at(partition, sys.maxsize))
        return partition

    def _move(self, collection: str, partition: Partition, row_ids: Sequence[str]) -> None:
        """Give a partition a collection of its own, with those of its rows that the shared one holds."""
        shared, held = self._places[collection].get(SHARED), self._make(collection, partition)
        for start in range(0, len(row_ids) if shared is not None else 0, MAX_BATCH):
            found = shared.get(ids=list(row_ids[start : start + MAX_BATCH]), include=["embeddings", "metadatas"])
            if found["ids"]:
                held.upsert(ids=found["ids"], embeddings=found["embeddings"], metadatas=found["metadatas"])
        self._places[collection][partition] = held  # only now is it asked instead of the shared one
        for start in range(0, len(row_ids) if shared is not None else 0, MAX_BATCH):
            _delete(shared, row_ids[start : start + MAX_BATCH])

    def _leave_others(self, collection: str, place: Partition | None, entries: Sequence[IndexedRow]) -> None:
        """Take rows out of where they may have been before they came to this place."""
        places = self._places[collection]
        if place is not SHARED:
            by_other = {SHARED: [entry.row_id for entry in entries]}
        else:
            by_other = defaultdict(list)
            for entry in entries:
                by_other[partition_of(entry)].append(entry.row_id)
        for other, row_ids in by_other.items():
            if other in places:
                _delete(places[other], row_ids)

    def forget(self, collection: str, row_ids: Iterable[str]) -> None:
        """Hold none of these any more: idempotent. Raises: IndexDamaged."""
        row_ids = list(row_ids)
        with _chroma_errors():
            for start in range(0, len(row_ids), MAX_BATCH):
                for held in self._held(collection):
                    _delete(held, row_ids[start : start + MAX_BATCH])

    def is_large(self, collection: str, partition: Partition) -> bool:
        """Return whether a partition has a collection of its own, and so needs no ids to be found."""
        return partition in self._places.get(collection, ())

    def find(
        self,
        collection: str,
        vector: numpy.ndarray,
        where: Mapping[str, str],
        num: int,
        *,
        compared: Sequence[str] = (),
        exclude_task: str | None = None,
    ) -> list[tuple[str, float]]:
        """Return (id, cosine similarity) of the nearest rows, best first: of the large partitions, and of the rows
        `compared`, which are one person's or of small partitions. Raises: IndexDamaged."""
        with _chroma_errors():
            hits = [_nearest(held, vector, num, exclude_task) for held in self._held(collection, where)]
            shared = self._places[collection].get(SHARED)
            if shared is not None and compared:
                hits.append(_compare(shared, vector, compared))
        nearest = heapq.nsmallest(num, (hit for of_one in hits for hit in of_one))
        return [(row_id, 1.0 - distance) for distance, row_id in nearest]

    def compare(
        self, collection: str, vector: numpy.ndarray, where: Mapping[str, str], row_ids: Sequence[str]
    ) -> list[tuple[str, float]]:
        """Return (id, cosine similarity) of these rows, as far as the partitions that the filter names hold them.
        Raises: IndexDamaged."""
        with _chroma_errors():
            shared = self._places[collection].get(SHARED)
            places = [*self._held(collection, where), *([] if shared is None else [shared])]
            hits = [hit for held in places for hit in _compare(held, vector, row_ids)]
        return [(row_id, 1.0 - distance) for distance, row_id in hits]

    def digests(self, collection: str) -> dict[str, str]:
        """Return what is held: the digest of each row, by id. Rows that a move left behind, because its process died,
        are deleted. Raises: IndexDamaged."""
        digests: dict[str, str] = {}
        left_behind: list[str] = []
        with _chroma_errors():
            for place, held in self._all(collection).items():
                for start in range(0, held.count(), PAGE):
                    page = held.get(limit=PAGE, offset=start, include=["metadatas"])
                    for row_id, metadata in zip(page["ids"], page["metadatas"], strict=True):
                        if place is SHARED and self._is_left_behind(collection, metadata):
                            left_behind.append(row_id)
                        else:
                            digests[row_id] = metadata["digest"]
            for start in range(0, len(left_behind), MAX_BATCH):
                _delete(self._places[collection][SHARED], left_behind[start : start + MAX_BATCH])
        return digests

    def _is_left_behind(self, collection: str, metadata: Mapping[str, Any]) -> bool:
        partition = tuple(metadata[name] for name in PARTITION)
        return not metadata["is_own"] and self.is_large(collection, partition)

    def count(self) -> dict[str, int]:
        """Return how many rows of each collection are held. Raises: IndexDamaged."""
        with _chroma_errors():
            return {name: sum(held.count() for held in self._all(name).values()) for name in COLLECTIONS}

    def _all(self, collection: str) -> dict[Partition | None, Any]:
        """Return the Chroma collections by place, the shared one among them."""
        if not self._places:
            raise IndexDamaged("the index of meanings is not open")
        return self._places[collection].copy()

    def _held(self, collection: str, where: Mapping[str, Any] | None = None) -> list[Any]:
        """Return the Chroma collections of the large partitions that a filter names; all there are without one."""
        places = self._all(collection)
        if where is None:
            return list(places.values())
        wanted = [(position, where[name]) for position, name in enumerate(PARTITION) if name in where]
        return [
            held
            for place, held in places.items()
            if place is not SHARED and all(place[position] == value for position, value in wanted)
        ]

    def _hold(self, collection: str, place: Partition | None) -> Any:
        """Return the Chroma collection of a place, made where it is missing."""
        places = self._all(collection)
        if place not in places:
            places[place] = self._places[collection][place] = self._make(collection, place)
        return places[place]

    def _make(self, collection: str, place: Partition | None) -> Any:
        values = place or ("", "", "")
        told = {"encoder": self._encoder_name, "layout": LAYOUT, "collection": collection, "is_shared": place is SHARED}
        name = hashlib.sha256(json.dumps([collection, place]).encode()).hexdigest()[:40]
        return self._client.get_or_create_collection(
            f"{collection}-{name}",
            embedding_function=None,  # Chroma's own would be downloaded
            configuration={"hnsw": SHARED_HNSW if place is SHARED else HNSW},
            metadata=told | dict(zip(PARTITION, values, strict=True)),
        )


def partition_of(entry: IndexedRow) -> Partition:
    return entry.tenant, entry.environment, entry.kind


def _metadata(entry: IndexedRow) -> dict[str, Any]:
    told = {"task": entry.task, "digest": entry.digest, "is_own": bool(entry.user_id)}
    return told | dict(zip(PARTITION, partition_of(entry), strict=True))


def _delete(held: Any, row_ids: Sequence[str]) -> None:
    found = held.get(ids=list(row_ids), include=[])["ids"]
    if found:
        held.delete(ids=found)


def _compare(held: Any, vector: numpy.ndarray, row_ids: Sequence[str]) -> list[tuple[float, str]]:
    """Return (distance, id) of these rows, as far as they are held."""
    import numpy

    found = held.get(ids=list(row_ids), include=["embeddings"])
    if not found["ids"]:
        return []
    vectors = numpy.asarray(found["embeddings"], dtype="float32")  # (num_rows, dim)
    norms = numpy.linalg.norm(vectors, axis=1) * numpy.linalg.norm(vector)
    similarities = vectors @ vector / numpy.maximum(norms, 1e-12)
    return [(1.0 - float(it), row_id) for it, row_id in zip(similarities, found["ids"], strict=True)]


def _nearest(held: Any, vector: numpy.ndarray, num: int, exclude_task: str | None) -> list[tuple[float, str]]:
    """Return (distance, id) of the nearest rows of one place, asking for more while too many are of that task."""
    include = ["distances", "metadatas"] if exclude_task else ["distances"]
    num_asked = num + SPARE if exclude_task else num
    while True:
        found = held.query(query_embeddings=[vector], n_results=num_asked, include=include)
        hits = list(zip(found["distances"][0], found["ids"][0], strict=True))
        if not exclude_task:
            return hits
        kept = [hit for hit, told in zip(hits, found["metadatas"][0], strict=True) if told["task"] != exclude_task]
        if len(kept) >= num or len(hits) < num_asked:
            return kept[:num]
        num_asked *= 4


def _connect(home: Path) -> Any:
    import chromadb  # seconds to import: only here
    from chromadb.config import Settings

    home.mkdir(parents=True, exist_ok=True)
    client = chromadb.PersistentClient(path=str(home), settings=Settings(anonymized_telemetry=False))
    # A place has four files open and takes some 3 MB. Chroma closes those asked longest ago when there are more than
    # a fifth of the files that the process may open, and one that it had not saved yet is then past reading ("Nothing
    # found on disk"). So none is closed, and more files may be opened. Chroma has no setting for it: it is told
    # before its Rust half starts, which is therefore started again.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    chroma: Any = client._server
    chroma.stop()
    chroma.hnsw_cache_size = MAX_OPEN_PARTITIONS
    chroma.start()
    return client


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
