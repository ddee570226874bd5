"""A million synthetic memories from some thousand real texts: texts and vectors, the same on every machine.

Flow: real texts -> the product's encoder, once, cached in a file -> any number of memories, each a function of its
number alone, so that a build can be resumed.

Invariant: a question is a real text that no memory was made of. A memory is made of a real text and one of its nearest
neighbours: its text alternates words of both; its vector is interpolated between theirs, plus noise with the covariance
of real vectors, so that clusters stay clusters.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy

from memory.records.documents import split_text
from memory.search.encoder import SentenceEncoder

DATA = Path(os.environ.get("BENCH_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
NUM_REAL = 5000
MAX_CHARS = 500
QUESTION_EVERY = 20  # one real text of so many becomes a question
NUM_NEAR = 12
NOISE = 0.35  # as a share of a real vector's distance from the mean
BLOCK = 1000  # memories that share a random seed
MARK = re.compile(r"memory (\d+)")


class Memories:
    """Memories by their number, and questions to ask of them."""

    def __init__(self, texts: Sequence[str], vectors: numpy.ndarray) -> None:
        is_question = numpy.arange(len(texts)) % QUESTION_EVERY == 0
        self.questions = [text for text, kept in zip(texts, is_question, strict=True) if kept]
        self.question_vectors = vectors[is_question]  # (num_questions, dim) float32, unit length
        self._texts = [text.split() for text, kept in zip(texts, is_question, strict=True) if not kept]
        self._vectors = vectors[~is_question]
        similarity = self._vectors @ self._vectors.T
        self._near = numpy.argpartition(-similarity, NUM_NEAR + 1, axis=1)[:, : NUM_NEAR + 1]
        centred = self._vectors - self._vectors.mean(axis=0)
        scales, directions = numpy.linalg.svd(centred, full_matrices=False)[1:]
        self._spread = (directions.T * scales / numpy.sqrt(len(centred))).T.astype("float32")  # (dim, dim)

    @property
    def num_real(self) -> int:
        return len(self._texts)

    def vectors(self, start: int, stop: int) -> numpy.ndarray:
        """Return the vectors of these memories, (stop - start, dim) float32 of unit length."""
        return numpy.concatenate([self._block(block)[2] for block in _blocks(start, stop)])[_within(start, stop)]

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of these memories; each contains its number."""
        made = []
        for block in _blocks(start, stop):
            first, second, _ = self._block(block)
            for place, (one, other) in enumerate(zip(first, second, strict=True)):
                made.append(f"memory {block * BLOCK + place}: {self._mix(block * BLOCK + place, one, other)}")
        return made[_within(start, stop)]

    def _block(self, block: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Return the first and the second real text of each memory of a block, and their vectors."""
        random = numpy.random.default_rng((20_000, block))
        first = random.integers(len(self._texts), size=BLOCK)
        second = self._near[first, random.integers(NUM_NEAR + 1, size=BLOCK)]
        share = random.uniform(0, 0.5, size=(BLOCK, 1)).astype("float32")
        noise = random.standard_normal((BLOCK, len(self._spread)), dtype="float32") @ self._spread
        moved = self._vectors[first] * (1 - share) + self._vectors[second] * share + NOISE * noise
        return first, second, moved / numpy.linalg.norm(moved, axis=1, keepdims=True)

    def _mix(self, number: int, first: int, second: int) -> str:
        """Return alternating runs of words of two texts, from a position in the first that the number decides."""
        words, others = self._texts[first], self._texts[second]
        begin = number * 7919 % max(1, len(words) - 24)
        turns = [words[begin : begin + 24], others[:12], words[begin + 24 : begin + 36], others[12:24]]
        return " ".join(word for turn in turns for word in turn)


class KeptEncoder:
    """Returns the precomputed vectors of memories and questions: embedding is not measured."""

    name = "kept"

    def __init__(self, memories: Memories) -> None:
        self._memories = memories
        self._questions = dict(zip(memories.questions, memories.question_vectors, strict=True))
        self._block: tuple[int, numpy.ndarray] = (-1, memories.question_vectors)

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        return numpy.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> numpy.ndarray:
        if text in self._questions:
            return self._questions[text]
        mark = MARK.search(text)
        if mark is None:  # warm-up of the encoder
            return self._memories.question_vectors[0]
        block, place = divmod(int(mark[1]), BLOCK)
        if self._block[0] != block:
            self._block = (block, self._memories.vectors(block * BLOCK, (block + 1) * BLOCK))
        return self._block[1][place]


def load_memories(directory: Path) -> Memories:
    """Encode the real texts with the product's encoder, or load them from an earlier run's cache in `directory`.

    Raises: FileNotFoundError if the public texts are missing.
    """
    kept = directory / "real_texts.npz"
    if kept.exists():
        found = numpy.load(kept)
        return Memories([str(text) for text in found["texts"]], found["vectors"])
    texts = list(dict.fromkeys(" ".join(text.split()) for text in _real_texts() if len(text.split()) >= 8))
    if not texts:
        raise FileNotFoundError(f"no public texts in {str(DATA)!r}: name their folder in BENCH_DATA")
    numpy.random.default_rng(1).shuffle(texts)
    texts = texts[:NUM_REAL]
    vectors = SentenceEncoder().encode(texts)
    directory.mkdir(parents=True, exist_ok=True)
    numpy.savez(kept, texts=numpy.array(texts), vectors=vectors)
    return Memories(texts, vectors)


def _real_texts() -> Iterator[str]:
    """Yield encyclopedia paragraphs and questions, sums, documentation, tool requests: those that are present."""
    for row in rows_of("beerqa_1000/beir/corpus.jsonl"):
        yield f"{row['title']}: {row['text']}"[:MAX_CHARS]
    for row in rows_of("beerqa_1000/beir/queries.jsonl"):
        yield row["text"]
    for row in rows_of("gsm8k/train.jsonl"):
        yield row["question"]
    for row in rows_of("xlam_form/*.jsonl"):
        yield row["query"]
    for path in sorted(DATA.glob("sharegpt_toolcalls/glaive*.json")):
        for row in json.loads(path.read_text()):
            yield from (turn["value"][:MAX_CHARS] for turn in row["conversations"])
    for path in sorted(DATA.glob("docs_corpus/**/*.md")):
        yield from split_text(path.read_text(), MAX_CHARS)
    for path in sorted(DATA.glob("docs_corpus/chroma/*.json")):
        yield from (text[:MAX_CHARS] for text in json.loads(path.read_text()).values())


def rows_of(pattern: str) -> list[dict]:
    """Return the rows of public JSONL files."""
    rows = []
    for path in sorted(DATA.glob(pattern)):
        for line in path.read_text().splitlines():
            if line.strip():
                rows.append(json.loads(line))
    return rows


def _blocks(start: int, stop: int) -> range:
    return range(start // BLOCK, -(-stop // BLOCK))


def _within(start: int, stop: int) -> slice:
    begin = start % BLOCK
    return slice(begin, begin + stop - start)
