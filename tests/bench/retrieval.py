"""Retrieval over many memories: recall and latency, against exact search over the same vectors.

    python -m tests.bench.retrieval --rows 100000 --directory /tmp/memories --json retrieval.json

Rows are written as documents write them, the product's index sync indexes them, and the product is queried. Embedding
is left out: a fake encoder returns precomputed vectors (see tests/bench/memories.py). Flow: build, or resume the build
in `--directory`, for at most `--build-seconds` -> query the rows written so far.

Recall is that of the vector index: the share of the exact ten nearest visible rows that it returned. Each question goes
to every side before the next one: exact search by numpy (the floor), the vector index, the text index, FTS5's own BM25
over everything (the peer of the text index), both indexes fused, and the whole memory segment. Processor time is
reported as well, because wall time on a busy machine misleads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
from sqlalchemy import insert, text
from sqlmodel import Session, col, func, select

from memory.schema import Document, Insight, Outbox, Passage
from memory.search.indexed_rows import IndexQuery
from memory.search.text_index import quote_terms
from memory.store import Memory
from tests.bench.measure import Spread, make_parser, print_table, run_open_loop, write_json
from tests.bench.memories import BLOCK, KeptEncoder, Memories, load_memories
from tests.bench.server import end_in_order

NUM_FOUND = 10
CHUNK = 2 * BLOCK  # memories written between two waits for the index
TENANT, NUM_NEIGHBOURS = "asked", 20
NEIGHBOUR_EVERY = 20  # one memory of so many is another tenant's as well, whose copy must not be found
NUM_INSIGHTS = 400  # 20 scopes of 20, the limit for one kind of task
NUM_BM25 = 20  # questions to FTS5's own ranking, which may take seconds
PASSAGES_PER_DOCUMENT = 100
PROGRESS = "progress.json"
Times = tuple[float, float]  # seconds of one question: wall time, processor time
FLOOR, MEANINGS, WORDS, BM25, FUSED, ROWS, SEGMENT = (
    "exact search (numpy)",
    "meanings",
    "words",
    "words by FTS5's bm25",
    "both, fused",
    "both and their rows",
    "memory segment",
)


def main() -> int:
    options = _parse()
    end_in_order()
    logging.basicConfig(level=logging.WARNING)
    try:
        memories = load_memories(options.cache)
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        return 0
    with _directory(options.directory) as directory, Memory.open(directory, encoder=KeptEncoder(memories)) as memory:
        return asyncio.run(_run(memory, memories, options))


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="memories of the tenant that asks")
    parser.add_argument("--directory", type=Path, help="kept, and gone on with; else a temporary one")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "ratchet-bench-texts")
    parser.add_argument("--build-seconds", type=float, default=3600.0, help="then stop; the same command goes on")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--per-second", type=float, default=20.0, help="of the open-loop part")
    parser.add_argument("--load-seconds", type=float, default=10.0, help="how long that lasts")
    return parser.parse_args()


@contextlib.contextmanager
def _directory(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="ratchet-retrieval-") as made:
            yield Path(made)


async def _run(memory: Memory, memories: Memories, options: argparse.Namespace) -> int:
    started_at = time.monotonic()
    await memory.index.drain(timeout_seconds=options.build_seconds)
    ready_seconds = time.monotonic() - started_at
    progress = await _build(memory, memories, options)
    built = {**progress, "ready_seconds": round(ready_seconds, 1), "rss_mb": _rss_mb(), "disk_mb": _disk_mb(memory)}
    asked = await _ask(memory, memories, progress["num_rows"], options)
    _report(asked, built, options)
    if progress["num_rows"] < options.rows:
        print(f"built {progress['num_rows']:,} of {options.rows:,}: the same command goes on")
        return 3
    return 0


# Building


async def _build(memory: Memory, memories: Memories, options: argparse.Namespace) -> dict[str, Any]:
    """Write memories and wait for the index, a chunk at a time; return the progress and its duration."""
    path = memory.data_dir / PROGRESS
    progress = json.loads(path.read_text()) if path.exists() else {"num_rows": 0, "build_seconds": 0.0, "rates": {}}
    with memory.database.read() as session:
        num_written = session.exec(
            select(func.count()).select_from(Passage).where(col(Passage.id).startswith("psg_asked"))
        ).one()
    started_at, before = time.monotonic(), progress["build_seconds"]
    if num_written > options.rows:
        raise ValueError(f"{str(memory.data_dir)!r} holds {num_written:,} rows: ask with --rows {num_written}")
    progress["num_rows"] = num_written
    if not num_written:
        memory.database.write_sync(lambda session: _write_insights(session, memories))
    for start in range(num_written, options.rows, CHUNK):
        if time.monotonic() - started_at > options.build_seconds:
            break
        chunk_at = time.monotonic()
        texts = memories.texts(start, min(start + CHUNK, options.rows))
        memory.database.write_sync(lambda session, start=start, texts=texts: _write(session, start, texts))
        await memory.index.drain(timeout_seconds=600)
        progress["num_rows"] = start + len(texts)
        progress["build_seconds"] = round(before + time.monotonic() - started_at, 1)
        progress["rates"][str(progress["num_rows"])] = round(len(texts) / (time.monotonic() - chunk_at))
        path.write_text(json.dumps(progress))
        print(f"\r{progress['num_rows']:,} rows, {progress['build_seconds']:,.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    return progress


def _write(session: Session, start: int, texts: list[str]) -> None:
    """Write memories of the tenant that asks, and some for a neighbour too, as documents write them."""
    numbers = range(start, start + len(texts))
    neighbour = start // CHUNK % NUM_NEIGHBOURS
    _write_passages(session, TENANT, "asked", dict(zip(numbers, texts, strict=True)))
    shared = {number: told for number, told in zip(numbers, texts, strict=True) if number % NEIGHBOUR_EVERY == 0}
    _write_passages(session, f"neighbour{neighbour}", f"other{neighbour}", shared)


def _write_passages(session: Session, tenant: str, mark: str, texts: dict[int, str]) -> None:
    documents, passages = {}, []
    for number, told in texts.items():
        group = number // PASSAGES_PER_DOCUMENT
        document_id = f"doc_{mark}_{group:08d}"
        documents[document_id] = {"id": document_id, "tenant": tenant, "title": f"Notes {group}", "digest": ""}
        passages.append(
            {"id": f"psg_{mark}_{number:08d}", "document_id": document_id, "position": number, "text": told}
        )
    session.execute(insert(Document).prefix_with("OR IGNORE"), list(documents.values()))
    session.execute(insert(Passage), passages)
    session.execute(insert(Outbox), [{"collection": "passages", "row_id": row["id"]} for row in passages])


def _write_insights(session: Session, memories: Memories) -> None:
    texts = memories.texts(0, NUM_INSIGHTS)
    rows = [{"id": f"ins_{number:08d}", "tenant": TENANT, "text": told} for number, told in enumerate(texts)]
    for number, row in enumerate(rows):
        row |= {"environment": f"environment{number % 4}", "kind": f"kind{number % 5}"}
    session.execute(insert(Insight), rows)
    session.execute(insert(Outbox), [{"collection": "insights", "row_id": row["id"]} for row in rows])


def _rss_mb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 2**20


def _disk_mb(memory: Memory) -> dict[str, int]:
    homes = {"rows_and_words": memory.data_dir.glob("*.db*"), "meanings": (memory.data_dir / "chroma").rglob("*")}
    return {name: sum(it.stat().st_size for it in found if it.is_file()) // 2**20 for name, found in homes.items()}


# Asking


async def _ask(memory: Memory, memories: Memories, num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    vectors = memories.vectors(0, num_rows)  # (num_rows, dim)
    times: dict[str, list[Times]] = defaultdict(list)
    recalls, overlaps, num_foreign = [], [], 0
    where = {"tenant": TENANT}
    questions = list(zip(memories.questions, memories.question_vectors, strict=True))[: options.questions]
    for position, (question, vector) in enumerate(questions):
        await memory.index._queries.encode(question)  # embedding is not measured
        exact = _time(times[FLOOR], lambda vector=vector: _nearest(vectors, vector))
        near = _time(
            times[MEANINGS],
            lambda vector=vector: memory.index._vector_index.find(IndexQuery("passages", "", where, NUM_FOUND), vector),
        )
        recalls.append(len({_number(row_id) for row_id, _ in near} & set(exact)) / NUM_FOUND)
        by_word = _time(
            times[WORDS],
            lambda question=question: memory.index._text_index.find(IndexQuery("passages", question, where, NUM_FOUND)),
        )
        if position < NUM_BM25:
            best = _time(times[BM25], lambda question=question: _bm25(memory, question))
            overlaps.append(len(set(best) & set(by_word)) / max(1, len(best)))
        fused = await _time_async(
            times[FUSED],
            lambda question=question: memory.index.find("passages", question, num=NUM_FOUND, tenant=TENANT),
        )
        await _time_async(
            times[ROWS],
            lambda question=question: memory.retrieval.find_passages(question, NUM_FOUND, tenant=TENANT),
        )
        await _time_async(times[SEGMENT], lambda question=question: _retrieve(memory, question))
        num_foreign += sum("_asked_" not in row_id for row_id in [*by_word, *(row_id for row_id, _ in [*near, *fused])])
    num_alone = memory.index.num_without_vectors

    async def act(number: int) -> None:
        await _retrieve(memory, questions[number % len(questions)][0])

    load = await run_open_loop(act, per_second=options.per_second, duration_seconds=options.load_seconds)
    return {
        "times": times,
        "recall": float(numpy.mean(recalls)),
        "worst_recall": min(recalls),
        "overlap": float(numpy.mean(overlaps)),
        "num_foreign": num_foreign,
        "load": load,
        "num_without_vectors": (num_alone, memory.index.num_without_vectors - num_alone),
    }


async def _retrieve(memory: Memory, question: str) -> Any:
    return await memory.retrieval.retrieve(
        environment="environment1", kind="kind1", query_text=question, tenant=TENANT, budget_tokens=2000
    )


def _nearest(vectors: numpy.ndarray, vector: numpy.ndarray) -> list[int]:
    similarities = vectors @ vector
    return numpy.argpartition(-similarities, NUM_FOUND)[:NUM_FOUND].tolist()


def _bm25(memory: Memory, question: str) -> list[str]:
    """Rank by FTS5's own function and filter its matches, as the product once did."""
    query = " OR ".join(quote_terms(question))
    statement = (
        "SELECT e.row_id FROM words JOIN word_entries e ON e.id = words.rowid WHERE words MATCH :query "
        "AND e.row_id LIKE 'psg_asked%' ORDER BY bm25(words) LIMIT :num"
    )
    with memory.database.read() as session:
        return list(session.execute(text(statement), {"query": query, "num": NUM_FOUND}).scalars())


def _number(row_id: str) -> int:
    return int(row_id.rpartition("_")[2])


def _time(times: list[Times], act: Callable[[], Any]) -> Any:
    started_at, cpu_at = time.perf_counter(), time.process_time()
    try:
        return act()
    finally:
        times.append((time.perf_counter() - started_at, time.process_time() - cpu_at))


async def _time_async(times: list[Times], act: Callable[[], Awaitable[Any]]) -> Any:
    started_at, cpu_at = time.perf_counter(), time.process_time()
    try:
        return await act()
    finally:
        times.append((time.perf_counter() - started_at, time.process_time() - cpu_at))


# Reporting


def _report(asked: dict[str, Any], built: dict[str, Any], options: argparse.Namespace) -> None:
    rows = []
    for side, times in asked["times"].items():
        row = {"side": side, "questions": len(times), **Spread.of([wall for wall, _ in times]).in_millis()}
        rows.append(row | {"cpu_p50_ms": Spread.of([cpu for _, cpu in times]).in_millis()["p50_ms"]})
    load = asked["load"]
    under_load = f"{SEGMENT}, {options.per_second:g}/s open loop"
    rows.append({"side": under_load, "questions": len(load.latencies), **load.spread.in_millis()})
    for row in rows:
        if row["side"] == MEANINGS:
            row["recall"] = round(asked["recall"], 4)
        if row["side"] == WORDS:
            row["overlap_with_bm25"] = round(asked["overlap"], 3)
    alone, alone_under_load = asked["num_without_vectors"]
    rate = built["num_rows"] / max(built["build_seconds"], 0.1)
    notes = [
        f"recall@{NUM_FOUND} {asked['recall']:.4f}, of the worst question {asked['worst_recall']:.1f}; "
        f"rows of other tenants among what was found: {asked['num_foreign']}",
        f"built in {built['build_seconds']:,.0f} s ({rate:,.0f} rows/s, no embedding); opened and compared with the "
        f"rows in {built['ready_seconds']:,.0f} s; resident {built['rss_mb']:,} MiB; on disk {built['disk_mb']} MiB",
        f"answered by words alone for the deadline's sake: {alone} in turn, {alone_under_load} under load; "
        f"errors under load: {sum(load.errors.values())}",
    ]
    print_table(f"Retrieval over {built['num_rows']:,} memories", rows, notes=notes)
    told = {"built": built, "recall_at_10": asked["recall"], "num_foreign": asked["num_foreign"]}
    conditions = {"rows": built["num_rows"], "questions": options.questions, "per_second": options.per_second}
    write_json(options.json, "retrieval", rows, conditions=conditions, **told)


if __name__ == "__main__":
    sys.exit(main())
