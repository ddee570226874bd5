"""Whether passages are shown only to questions that they answer, and how many of the right ones are found.

    python -m tests.bench.relevance --json relevance.json

Four real collections: 1,762 encyclopedia paragraphs (BeerQA), the documentation of two libraries, and this project's
own pages. To each are asked questions that its documents answer, and 200 that they don't: everyday chat, sums,
programming exercises, tool requests, and questions about the other collections. All of it goes through the product:
documents become rows, the index sync indexes them, `Retrieval.retrieve` is called as a request calls it.

The peer is retrieval without the relevance floor: the best five of both indexes, fused by rank, for the same questions
in the same run. The figures of the odd-numbered questions are shown beside those of all. The unanswerable questions in
`TOUCHED` are left out, and the next of everyday chat are asked instead: an encyclopedia paragraph states the answer or
explains the subject. They were found by searching all paragraphs for some 65 subjects that the questions name, and
reading the matches, without any score.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from memory.config import MemoryConfig
from memory.records.documents import split_text
from memory.schema import Document, Outbox, Passage
from memory.search.encoder import SentenceEncoder
from memory.search.relevance import MIN_SIMILARITY
from memory.store import Memory
from tests.bench.measure import make_parser, print_table, write_json
from tests.bench.memories import DATA, rows_of
from tests.bench.server import end_in_order

QUESTIONS = Path(__file__).parent / "questions"
OWN_PAGES = ("README.md", "docs/clients.md", "docs/gate.md", "docs/keys.md", "docs/operations.md", "docs/tools.md")
TOUCHED = {
    "What is the tallest mountain in the world?": "b00682",  # K2: "the second highest mountain, after Mount Everest"
    "Who was the president of the United States during the American Civil War?": "b00778",  # President Lincoln, 1862
    "How do I back up the data directory?": "b00708",  # database backups and how to restore them
}
"""Questions that a paragraph of the encyclopedia answers after all, and its id."""
NUM_SHOWN = 5
NUM_CHAT, NUM_OTHERS = 60, 140
PASSAGE_CHARS = 800
CONFIG = MemoryConfig(
    retrieval_deadline_seconds=60, encoding_deadline_seconds=120, max_passages=NUM_SHOWN, memory_tokens=100_000
)


@dataclass(frozen=True)
class Collection:
    """Passages with the paragraph or page they come from, and the questions that they answer."""

    name: str
    passages: list[tuple[str, str, str]]
    """(paragraph's id, title, text)."""
    questions: list[str]
    right: list[set[str]]
    """The paragraphs that answer each question; empty where only the collection is known."""
    others: list[str]
    """Questions that no document here answers."""


def main() -> int:
    options = make_parser(__doc__).parse_args()
    end_in_order()
    logging.basicConfig(level=logging.WARNING)
    if not DATA.exists():
        print(f"skipped: no public texts in {str(DATA)!r}: name their folder in BENCH_DATA")
        return 0
    rows = [asyncio.run(measure(collection)) for collection in load_collections()]
    print_table("passages shown, with a floor and without", rows)
    conditions = {"num_shown": NUM_SHOWN, "num_chat": NUM_CHAT, "num_others": NUM_OTHERS}
    write_json(options.json, "relevance", rows, conditions=conditions)
    return 0


async def measure(collection: Collection) -> dict[str, Any]:
    """Send all questions to a collection; return one row of the table."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as home, Memory.open(home, CONFIG, encoder=SentenceEncoder()) as memory:
        memory.database.write_sync(lambda session: _write(session, collection))
        await memory.index.drain(timeout_seconds=1800)
        answered = [await _ask(memory, question) for question in collection.questions]
        others = [await _ask(memory, question) for question in collection.others]
    row: dict[str, Any] = {"collection": collection.name, "passages": len(collection.passages)}
    row["answerable"] = len(answered)
    row["shown %"] = _percent([bool(shown) for shown, _ in answered])
    if any(collection.right):
        for name, side in (("recall@5", 0), ("without floor", 1)):
            recalls = [
                len(right & set(found[side])) / len(right)
                for right, found in zip(collection.right, answered, strict=True)
            ]
            row[name] = round(sum(recalls) / len(recalls), 4)
            row[f"{name}, odd"] = round(sum(recalls[1::2]) / len(recalls[1::2]), 4)
    row["unanswerable"] = len(others)
    row["shown to them %"] = _percent([bool(shown) for shown, _ in others])
    row["odd %"] = _percent([bool(shown) for shown, _ in others[1::2]])
    row["chat %"] = _percent([bool(shown) for shown, _ in others[:NUM_CHAT]])
    row["without floor %"] = _percent([bool(fused) for _, fused in others])
    row["seconds"] = round(time.monotonic() - began)
    return row


async def _ask(memory: Memory, question: str) -> tuple[list[str], list[str]]:
    """Return the paragraphs that a request is shown, and those that it would get without the floor."""
    shown = await memory.retrieval.retrieve(environment=None, kind="chat", query_text=question)
    fused = await memory.index.find("passages", question, num=NUM_SHOWN, min_similarity=MIN_SIMILARITY)
    return [_paragraph(it) for it in shown.ids], [_paragraph(it) for it, _ in fused]


def load_collections() -> Iterator[Collection]:
    """Yield the collections, each with the questions of the others."""
    encyclopedia = [(row["_id"], row["title"], row["text"]) for row in rows_of("beerqa_1000/beir/corpus.jsonl")]
    asked = rows_of("beerqa_1000/beir/queries.jsonl")
    right: dict[str, set[str]] = {row["_id"]: set() for row in asked}
    for line in (DATA / "beerqa_1000/beir/qrels/test.tsv").read_text().splitlines()[1:]:
        question, paragraph, _ = line.split("\t")
        right[question].add(paragraph)
    general = {
        "encyclopedia": [row["text"] for row in asked],
        "sums": [row["question"] for row in rows_of("gsm8k/test.jsonl")],
        "exercises": list(_exercises()),
        "tools": list(_tool_requests()),
    }
    pages = {
        "httpx": _pages(DATA / "docs_corpus/httpx"),
        "llm": _pages(DATA / "docs_corpus/llm", without=("changelog", "help")),
        "own": [(name, Path(name).stem, Path(name).read_text()) for name in OWN_PAGES],
    }
    special = {name: read_questions(name) for name in pages}
    software = [question for three in zip(*special.values(), strict=False) for question in three]
    yield _collect(
        "encyclopedia",
        encyclopedia,
        general["encyclopedia"],
        list(right.values()),
        [general["sums"], general["exercises"], general["tools"], software],
    )
    for name, texts in pages.items():
        others = [general["sums"], general["encyclopedia"], general["tools"], general["encyclopedia"][500:]]
        yield _collect(name, texts, special[name], [set() for _ in special[name]], others)


def _collect(
    name: str,
    texts: Sequence[tuple[str, str, str]],
    questions: list[str],
    right: list[set[str]],
    kinds: Sequence[Sequence[str]],
) -> Collection:
    ids = {id_ for id_, _, _ in texts}
    chat = [question for question in read_questions("chat") if TOUCHED.get(question) not in ids]
    others = chat[:NUM_CHAT]
    for kind in kinds:
        step = max(1, len(kind) // (NUM_OTHERS // len(kinds)))
        others += [it for it in kind[::step][: NUM_OTHERS // len(kinds)] if TOUCHED.get(it) not in ids]
    others += chat[NUM_CHAT:][: NUM_CHAT + NUM_OTHERS - len(others)]  # in the place of those left out
    passages = [(id_, title, piece) for id_, title, text in texts for piece in split_text(text, PASSAGE_CHARS)]
    return Collection(name, passages, questions, right, others)


def read_questions(name: str) -> list[str]:
    """Return the questions of one file, one a line."""
    return (QUESTIONS / f"{name}.txt").read_text().splitlines()


def _pages(folder: Path, without: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    paths = [path for path in sorted(folder.rglob("*.md")) if path.stem not in without]
    return [(path.stem, path.stem, path.read_text()) for path in paths]


def _exercises() -> Iterator[str]:
    for row in rows_of("mbpp_py/mbpp-py.jsonl"):
        if told := re.search(r'"""\s*(\S[^\n]*)', row["prompt"]):
            yield told[1]


def _tool_requests() -> Iterator[str]:
    for kind in ("simple_python", "live_simple", "irrelevance"):
        for row in rows_of(f"bfcl/BFCL_v4_{kind}.json"):
            yield row["question"][0][-1]["content"]
    for path in sorted(DATA.glob("sharegpt_toolcalls/glaive*.json")):
        for row in json.loads(path.read_text()):
            yield row["conversations"][0]["value"]


def _write(session: Any, collection: Collection) -> None:
    """Write the passages as documents write them, each with its paragraph in its id."""
    documents = {title: f"doc_{number}" for number, title in enumerate({title for _, title, _ in collection.passages})}
    session.execute(insert(Document), [{"id": id_, "title": title, "digest": id_} for title, id_ in documents.items()])
    passages = [
        {"id": f"{paragraph}#{number}", "document_id": documents[title], "position": number, "text": text}
        for number, (paragraph, title, text) in enumerate(collection.passages)
    ]
    session.execute(insert(Passage), passages)
    session.execute(insert(Outbox), [{"collection": "passages", "row_id": row["id"]} for row in passages])


def _paragraph(row_id: str) -> str:
    return row_id.rpartition("#")[0]


def _percent(are: Sequence[bool]) -> float:
    return round(100 * sum(are) / max(1, len(are)), 1)


if __name__ == "__main__":
    raise SystemExit(main())
