"""Whom passages are shown to, with real documents and questions: the figures of docs/retrieval.md, held. Minutes."""

from __future__ import annotations

import pytest

from tests.bench.memories import DATA
from tests.bench.relevance import NUM_CHAT, NUM_OTHERS, load_collections, measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not DATA.exists(), reason=f"no public texts in {str(DATA)!r}: name their folder in BENCH_DATA"),
]
ONE_QUESTION = 0.001
"""What one question more or less changes of the recall over BeerQA's 1,000."""


@pytest.mark.parametrize("name", ["encyclopedia", "httpx", "llm", "own"])
async def test_few_questions_that_no_document_answers_are_shown_passages(name: str):
    collection = next(it for it in load_collections() if it.name == name)
    assert len(collection.others) == NUM_CHAT + NUM_OTHERS == 200

    row = await measure(collection)

    print(row)
    assert row["shown to them %"] <= 2.0
    assert row["shown %"] >= 90
    if any(collection.right):
        assert row["recall@5"] > row["without floor"] - ONE_QUESTION
