"""Queries share batches; the real encoder finds texts with the same meaning."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

import numpy
import pytest

from memory.errors import IndexUnavailable
from memory.search.encoder import MAX_QUERY_CHARS, QueryEncoder, SentenceEncoder, model_name
from memory.search.indexed_rows import IndexQuery
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder


class HeldEncoder(HashingEncoder):
    """An encoder that blocks until the test releases it."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.batches: list[list[str]] = []

    def encode(self, texts):
        self.batches.append(list(texts))
        self.release.wait(10)
        if "unspeakable" in texts:
            raise KeyError("planted")
        return super().encode(texts)


@pytest.fixture
def held():
    encoder = HeldEncoder()
    queries = QueryEncoder(encoder)
    yield encoder, queries
    encoder.release.set()
    queries.close()


async def test_questions_that_wait_share_a_batch_and_known_ones_cost_nothing(held):
    encoder, queries = held
    tasks = [asyncio.ensure_future(queries.encode(text)) for text in ("a", "b", "a", "c")]
    await asyncio.sleep(0.05)
    encoder.release.set()
    vectors = await asyncio.gather(*tasks)
    assert numpy.array_equal(vectors[0], vectors[2]) and len(encoder.batches) <= 2
    await queries.encode("b")
    assert sorted(text for batch in encoder.batches for text in batch) == ["a", "b", "c"]


async def test_a_known_question_keeps_no_more_than_its_own_vector(held):
    encoder, queries = held
    tasks = [asyncio.ensure_future(queries.encode(str(number))) for number in range(30)]
    await asyncio.sleep(0.05)
    encoder.release.set()
    await asyncio.gather(*tasks)
    assert all(vector.base is None for vector in queries._cache.values()) and len(queries._cache) == 30


async def test_a_question_given_up_is_not_taken_from_the_others(held):
    encoder, queries = held
    first, second = asyncio.ensure_future(queries.encode("a")), asyncio.ensure_future(queries.encode("a"))
    await asyncio.sleep(0.02)
    first.cancel()
    encoder.release.set()
    assert (await second).shape == (128,)


async def test_an_encoder_that_fails_is_unavailable_and_may_recover(held):
    encoder, queries = held
    encoder.release.set()
    with pytest.raises(IndexUnavailable, match="'hashing' failed: KeyError"):
        await queries.encode("unspeakable")
    assert (await queries.encode("a")).shape == (128,)


async def test_of_a_question_of_megabytes_the_beginning_alone_is_read_and_nothing_is_kept(tmp_path: Path):
    encoder = HeldEncoder()
    encoder.release.set()
    with Memory.open(tmp_path, PATIENT, encoder=encoder) as memory:
        await memory.documents.ingest("Cars", "How to change the tyre of an automobile.")
        await memory.index.drain()
        encoder.batches.clear()
        asked: list[IndexQuery] = []
        match = memory.index._text_index.match
        memory.index._text_index.match = lambda query: asked.append(query) or match(query)
        question = "how to change a tyre " * 100_000
        found = await memory.index.find("passages", question, num=1)
        matches, _ = await memory.index.match("passages", question + "?", num=1)
        cached = list(memory.index._queries._cache)
    assert len(found) == len(matches) == 1
    texts = [text for batch in encoder.batches for text in batch] + [query.text for query in asked]
    assert texts and {len(text) for text in texts} == {MAX_QUERY_CHARS}
    assert cached and all(sys.getsizeof(key) < 100 for key in cached)


async def test_the_embedded_encoder_finds_by_meaning(tmp_path: Path):
    """The real all-MiniLM-L6-v2, from its package: seconds to load, no network."""
    encoder = SentenceEncoder()
    with Memory.open(tmp_path, PATIENT, encoder=encoder) as memory:
        await memory.documents.ingest("Cars", "How to change the tyre of an automobile.")
        await memory.documents.ingest("Bread", "Knead the dough and let it rise overnight.")
        await memory.index.drain(timeout_seconds=900)
        by_word = memory.index._text_index.find(IndexQuery("passages", "repairing a vehicle's wheel", {}, 5))
        found = await memory.index.find("passages", "repairing a vehicle's wheel", num=1, min_similarity=0.3)
        assert by_word == [] and len(found) == 1
        segment = await memory.retrieval.retrieve(
            environment=None, kind="chat", query_text="repairing a vehicle's wheel"
        )
    assert segment.text.startswith("<memory>\nPassages:\nCars: How to change the tyre")
    assert (encoder.max_tokens(), encoder.count_tokens(["rain", "rain " * 300, ""])) == (256, [3, 302, 2])
    first, second, other = encoder.encode(["rain " * 254 + "tea", "rain " * 254 + "coffee", "rain " * 253 + "tea"])
    assert numpy.allclose(first, second, atol=1e-6), "more than max_tokens was read"
    assert not numpy.allclose(first, other, atol=1e-4), "fewer than max_tokens were read"


def test_clients_know_an_encoder_by_the_name_of_its_model():
    names = {"embedded": "all-MiniLM-L6-v2", "org/model": "org/model", "/models/mine": "mine"}
    assert {name: model_name(SentenceEncoder(name)) for name in names} == names
