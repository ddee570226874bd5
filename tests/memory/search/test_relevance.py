"""Passages and solved tasks are shown only to requests that they may help: real pages, real encoder."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.schema import Split
from memory.search.encoder import SentenceEncoder
from memory.search.index import MemoryIndex
from memory.search.relevance import (
    NUM_BEST,
    Match,
    WordMatch,
    floor_of,
    join_matches,
    select_relevant,
    select_word_only_rows,
)
from memory.store import Memory
from tests.memory.episodes import PATIENT, play

PAGES = Path(__file__).parents[3] / "docs"
UNANSWERABLE = """Hello
Hi there!
Good morning
Thanks a lot!
Who are you?
Tell me a joke
What is the capital of France?
How do I boil an egg?
Translate "good night" into Spanish
Write a poem about autumn
What is 17 times 23?
Who painted the Mona Lisa?
Why is the sky blue?
How long do I roast a chicken?
What is photosynthesis?
Recommend a good film for tonight
Plan a weekend in Rome for me
How do I change a flat tyre?
Why?
test""".splitlines()
ANSWERED = {
    "How do I add an MCP server as a tool?": "## MCP servers",
    "Can the agent run Python code in a sandbox?": "run_python: code in a sandbox",
    "How do I offer my own Python function to the agent?": "## Python functions",
    "Does the agent trust the text of a web page that it fetched?": "| `fetch_page`",
    "Do tools with side effects run in rehearsals?": "## Side effects",
}


class KeptVectors(SentenceEncoder):
    """The real encoder with a cache that all tests share."""

    def __init__(self) -> None:
        super().__init__()
        self._vectors: dict[str, numpy.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            self._vectors.update(zip(new, super().encode(new), strict=True))
        return numpy.stack([self._vectors[text] for text in texts])


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return KeptVectors()


@pytest.fixture
async def pages(tmp_path: Path, encoder: SentenceEncoder) -> AsyncIterator[Memory]:
    with Memory.open(tmp_path, PATIENT, encoder=encoder) as memory:
        await memory.documents.ingest("Tools", PAGES / "tools.md")
        await memory.index.drain(timeout_seconds=900)
        yield memory


async def ask(memory: Memory, question: str, **more) -> str:
    return (await memory.retrieval.retrieve(environment=None, kind="chat", query_text=question, **more)).text


async def test_only_questions_that_the_pages_answer_are_shown_passages(pages: Memory):
    shown = {question: await ask(pages, question) for question in UNANSWERABLE}
    assert not {question: text for question, text in shown.items() if text}
    missed = [question for question, words in ANSWERED.items() if words not in await ask(pages, question)]
    assert not missed


async def test_without_vectors_passages_need_most_of_the_questions_words(
    pages: Memory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(MemoryIndex, "has_vectors", False)
    assert "bubblewrap" in await ask(pages, "does bubblewrap need namespaces?")
    assert not [question for question in UNANSWERABLE if await ask(pages, question)]


async def test_who_searches_the_documents_is_not_held_to_the_floor(pages: Memory):
    found = [await pages.retrieval.find_passages(question, 3) for question in UNANSWERABLE]
    assert any(found)  # the first test shows that none reaches a prompt


async def test_only_alike_requests_are_shown_a_solved_chat(tmp_path: Path, encoder: SentenceEncoder):
    solved = ("How do I cook rice?", "Write a poem about spring", "What is the capital of Spain?", "Tell me a riddle")
    with Memory.open(tmp_path, PATIENT, encoder=encoder) as memory:
        for text in solved:
            await play(memory, environment=None, kind="chat", task_text=text, split=Split.LIVE, user_id="jane")
        await memory.index.drain(timeout_seconds=900)
        assert "cook rice" in await ask(memory, "What is the way to cook rice?", user_id="jane")
        for question in ("Hello", "How do I boil an egg?", "What is 2 + 2?", "How does a mortgage work?"):
            assert await ask(memory, question, user_id="jane") == ""


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1), st.floats(0, 5)), max_size=10),
    st.lists(st.tuples(st.integers(0, 9), st.floats(-1, 1)), max_size=10),
    st.integers(0, 10**7),
)
def test_what_is_selected_is_ranked_and_more_rows_raise_the_bar(words, near, num_rows):
    by_word = [WordMatch(str(it), share, num) for it, share, num in words]
    found = join_matches(by_word, {str(it): similarity for it, similarity in near}, num=10)
    assert len({match.row_id for match in found}) == len(found)
    selected = select_relevant(found, num_rows)
    assert [match.score for match in selected] == sorted((match.score for match in selected), reverse=True)
    assert not selected or max(match.relevance for match in selected) >= floor_of(num_rows)
    assert {match.row_id for match in select_relevant(found, 10 * num_rows)} <= {match.row_id for match in selected}


@given(
    st.lists(st.floats(-1, 1), max_size=12),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=10),
)
def test_a_row_that_is_not_compared_cannot_rank_among_the_best(near, others):
    nearest = {f"near{number}": similarity for number, similarity in enumerate(near)}
    by_word = [WordMatch(f"other{number}", coverage, 1.0) for number, (coverage, _) in enumerate(others)]
    furthest = min(near, default=1.0)
    true = {f"other{number}": furthest - further for number, (_, further) in enumerate(others)}
    chosen = select_word_only_rows(by_word, nearest)
    best = {match.row_id for match in join_matches(by_word, nearest | true, num=10)[:NUM_BEST]}
    assert best <= {*nearest, *chosen}


@pytest.mark.parametrize(
    ("similarity", "coverage", "num_words", "is_shown"),
    [
        (0.47, 0.50, 0.48, False),  # "What is the capital of Australia?": a paragraph about who named Antarctica
        (0.46, 0.33, 0.59, False),  # "Plan a weekend in Rome for me": religion in ancient Rome
        (0.34, 1.00, 0.71, False),  # "Are you a robot?": a fictional robot
        (0.53, 0.00, 0.00, False),  # a sum about a hike: a trail
        (0.34, 0.49, 1.70, True),  # "What instrument did the winners for five seasons in a row play?"
        (0.40, 0.55, 1.30, True),  # "What type of aircraft was the German Plane?"
        (0.52, 0.26, 0.87, True),  # "In which continent will you find both Lygodium and Dendrocalamus?"
    ],
)
def test_among_encyclopedia_paragraphs_meaning_and_words_must_agree(similarity, coverage, num_words, is_shown):
    best = Match("row", similarity, WordMatch("row", coverage, num_words))
    assert bool(select_relevant([best], num_rows=2_050)) is is_shown


def test_the_floor_is_what_was_measured():
    assert floor_of(127) == pytest.approx(0.098 + 0.067 * math.log(127))
    assert floor_of(0) == floor_of(100) and floor_of(10**6) == floor_of(5_000)
    alone = Match("row", None, WordMatch("row", coverage=0.9, num_words=3.0))
    assert select_relevant([alone], 1) == [alone]
