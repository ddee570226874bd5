"""Search over both indexes, and every damage that the index must survive."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlmodel import select

from memory.config import MemoryConfig
from memory.errors import IndexDamaged
from memory.records.insights import OperationKind
from memory.schema import Insight, Outbox, RewardSource, Split, TrajectoryStage
from memory.search.index import MAX_HANGING, MemoryIndex, fuse
from memory.search.indexed_rows import IndexedRow, IndexQuery
from memory.search.vector_index import VectorIndex
from memory.store import Memory
from tests.memory.episodes import HashingEncoder, add, operation, play

KITCHEN = {"environment": "kitchen", "kind": "cooking"}


async def held(memory: Memory) -> dict[str, dict[str, int]]:
    """Return the row counts of both indexes once they are up to date."""
    await memory.index.drain()
    return {"text": memory.index._text_index.count(), "vectors": memory.index._vector_index.count()}


def both(insights: int = 0, exemplars: int = 0, passages: int = 0) -> dict[str, dict[str, int]]:
    counts = {"insights": insights, "exemplars": exemplars, "passages": passages}
    return {"text": counts, "vectors": counts}


def chroma_files(data_dir: Path) -> list[Path]:
    return [path for path in (data_dir / "chroma").glob("idx_*/**/*") if path.is_file()]


async def ids_found(memory: Memory, collection: str, query: str, **filters) -> list[str]:
    return [row_id for row_id, _ in await memory.index.find(collection, query, **filters)]


async def test_the_index_holds_what_the_rows_say_and_the_outbox_empties(memory: Memory):
    trajectory = await play(memory, task="t1", task_text="fry the carrot")
    await memory.insights.apply([add("fry on the stove")])
    document = await memory.documents.ingest("Stove", "How to fry.")
    assert await held(memory) == both(1, 1, 1)
    with memory.database.read() as session:
        assert session.exec(select(Outbox)).all() == []
    assert await ids_found(memory, "exemplars", "fry the potato", where=KITCHEN) == [trajectory.id]
    await memory.documents.remove(document.id)
    await memory.insights.apply([operation(OperationKind.REMOVE, "fry on the stove")] * 2)
    assert await held(memory) == both(0, 1, 0)


async def test_an_exemplar_comes_and_goes_with_its_reward(memory: Memory):
    trajectory = await play(memory, reward=0.0)
    assert await held(memory) == both()
    await memory.trajectories.reward(trajectory.id, 1.0, RewardSource.USER)
    assert await held(memory) == both(exemplars=1)
    await memory.trajectories.reward(trajectory.id, 0.0, RewardSource.USER)
    assert await held(memory) == both()


async def test_held_out_and_failed_episodes_are_never_exemplars(memory: Memory):
    await play(memory, split=Split.HELD_OUT)
    await play(memory, stage=TrajectoryStage.FAILED)
    assert await held(memory) == both()
    assert await memory.index.rebuild() == {"insights": 0, "exemplars": 0, "passages": 0}


async def test_filters_hold_on_both_sides(memory: Memory):
    mine = await play(memory, task="t1", task_text="fry the carrot")
    other = await play(memory, task="t2", task_text="fry the carrot", kind="baking")
    live = await play(
        memory, task_text="fry the carrot", environment=None, kind="chat", split=Split.LIVE, is_shared=True
    )
    await memory.index.drain()
    assert await ids_found(memory, "exemplars", "fry the carrot", where=KITCHEN) == [mine.id]
    assert await ids_found(memory, "exemplars", "fry the carrot", where=KITCHEN, exclude_task="t1") == []
    assert await ids_found(memory, "exemplars", "carrot", where={"environment": "", "kind": "chat"}) == [live.id]
    assert set(await ids_found(memory, "exemplars", "carrot")) == {mine.id, other.id, live.id}
    with pytest.raises(ValueError, match="no collection is called 'recipes'"):
        await memory.index.find("recipes", "carrot")


def test_many_rows_of_the_task_left_out_hide_no_other(tmp_path: Path):
    vector_index = VectorIndex(tmp_path, "hashing")
    vector_index.open()
    rows = [IndexedRow(f"trj{number:03d}", f"fry {number}", "kitchen", "cooking", "asked") for number in range(120)]
    rows += [IndexedRow("far", "roast", "kitchen", "cooking", "other"), IndexedRow("away", "fry", "garden", "cooking")]
    vectors = HashingEncoder().encode([row.text for row in rows])
    vector_index.upsert("exemplars", rows, vectors)
    found = vector_index.find(IndexQuery("exemplars", "", KITCHEN, 5, exclude_task="asked"), vectors[0])
    assert [row_id for row_id, _ in found] == ["far"] and vector_index.count()["exemplars"] == 122
    assert "away" in dict(vector_index.find(IndexQuery("exemplars", "", {"kind": "cooking"}, 122), vectors[0]))
    vector_index.forget("exemplars", ["far", "away", "never"])
    assert vector_index.digests("exemplars").keys() == {row.row_id for row in rows[:120]}
    vector_index.close()


async def test_a_chroma_that_hangs_costs_the_deadline_and_then_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    release, deadline = threading.Event(), 0.5
    config = MemoryConfig(retrieval_deadline_seconds=deadline, encoding_deadline_seconds=120)
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        await memory.insights.apply([add("fry on the stove")])
        await memory.index.drain()
        monkeypatch.setattr(memory.index._vector_index, "find", lambda *_, **__: release.wait(60) and [])
        for _ in range(MAX_HANGING):
            assert len(await ids_found(memory, "insights", "fry")) == 1
        assert not memory.index.has_vectors
        began = asyncio.get_running_loop().time()
        assert len(await ids_found(memory, "insights", "fry")) == 1
        assert asyncio.get_running_loop().time() - began < deadline
        assert memory.index.num_without_vectors == MAX_HANGING + 1
        release.set()
        while not memory.index.has_vectors:
            await asyncio.sleep(0.01)


async def test_a_chroma_that_fails_never_fails_a_question(memory: Memory, monkeypatch: pytest.MonkeyPatch):
    await memory.insights.apply([add("fry on the stove")])
    await memory.index.drain()

    class Panic(BaseException):
        """A BaseException, as Chroma's Rust half raises them."""

    def fail(*_, **__):
        raise Panic("planted")

    monkeypatch.setattr(memory.index._vector_index, "_all", fail)
    with pytest.raises(IndexDamaged, match="Panic: planted"):
        memory.index._vector_index.find(IndexQuery("insights", "", {}), [0.0])
    assert len(await ids_found(memory, "insights", "fry")) == 1
    monkeypatch.undo()
    await memory.index.drain()


async def test_deleted_chroma_files_are_noticed_and_made_anew(memory: Memory):
    await memory.insights.apply([add("fry on the stove")])
    await memory.index.drain()
    shutil.rmtree(memory.data_dir / "chroma")
    assert len(await ids_found(memory, "insights", "fry")) == 1
    await memory.insights.apply([add("roast in the oven")])
    assert await held(memory) == both(insights=2)
    assert chroma_files(memory.data_dir)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(b"garbage " * 1000)


@pytest.mark.parametrize("damage", [truncate, overwrite, Path.unlink])
async def test_an_unreadable_chroma_directory_is_set_aside_and_rebuilt(tmp_path: Path, config: MemoryConfig, damage):
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        await memory.insights.apply([add("fry on the stove"), add("roast in the oven")])
        await memory.index.drain()
    for path in chroma_files(tmp_path):
        damage(path)
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        assert await held(memory) == both(insights=2)
        assert len(await ids_found(memory, "insights", "roast")) >= 1


async def test_an_index_that_is_being_checked_is_not_up_to_date(memory: Memory, monkeypatch: pytest.MonkeyPatch):
    await memory.insights.apply([add("fry on the stove")])
    await memory.index.drain()
    begun, may_end = threading.Event(), threading.Event()
    verify = memory.index._vector_index.verify

    def verify_slowly() -> None:
        begun.set()
        may_end.wait(30)
        verify()

    monkeypatch.setattr(memory.index._vector_index, "verify", verify_slowly)
    try:
        memory.index._sync.request_check()
        for _ in range(2):  # before the check, and during it
            with pytest.raises(TimeoutError, match="not up to date"):
                await memory.index.drain(timeout_seconds=0.0)
            assert await asyncio.to_thread(begun.wait, 30)
    finally:
        may_end.set()
    await memory.index.drain()


async def test_what_the_index_lost_or_kept_too_long_is_reconciled_at_the_start(tmp_path: Path, config: MemoryConfig):
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        await memory.insights.apply([add("fry on the stove"), add("roast in the oven")])
        await memory.index.drain()
        lost, stale = memory.insights.active()
        vector_index = memory.index._vector_index
        vector_index.forget("insights", [lost.id])
        next(iter(vector_index._all("insights").values())).update(ids=[stale.id], metadatas=[{"digest": "old"}])
        vector_index.upsert(
            "insights", [IndexedRow("ins_never", "never said")], memory.index._queries._encoder.encode(["x"])
        )
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        assert await held(memory) == both(insights=2)
        assert "old" not in memory.index._vector_index.digests("insights").values()


async def test_a_rebuild_brings_everything_back(memory: Memory):
    await play(memory, task_text="fry the carrot")
    await memory.insights.apply([add("fry on the stove")])
    await memory.documents.ingest("Stove", "How to fry.")
    await memory.index.drain()
    memory.index._text_index.write(lambda session: session.execute(text("DROP TABLE words")).close())
    memory.index._vector_index.forget("insights", [memory.insights.active()[0].id])
    assert await ids_found(memory, "passages", "fry")  # by vectors alone
    assert await memory.index.rebuild() == {"insights": 1, "exemplars": 1, "passages": 1}
    assert await held(memory) == both(1, 1, 1)


async def test_another_encoder_begins_another_index(tmp_path: Path, config: MemoryConfig):
    with Memory.open(tmp_path, config, encoder=HashingEncoder("first")) as memory:
        await memory.insights.apply([add("fry on the stove")])
        await memory.index.drain()
    encoder = HashingEncoder("second")
    with Memory.open(tmp_path, config, encoder=encoder) as memory:
        assert await held(memory) == both(insights=1)
        assert encoder.num_calls == 2  # warm-up, and the insight


async def test_an_encoder_that_cannot_load_leaves_words(tmp_path: Path, config: MemoryConfig):
    class BrokenEncoder:
        name = "broken"

        def encode(self, texts):
            raise OSError("no such model")

    with Memory.open(tmp_path, config, encoder=BrokenEncoder()) as memory:
        await memory.insights.apply([add("fry on the stove")])
        with pytest.raises(TimeoutError, match="'broken' failed: OSError: no such model"):
            await memory.index.drain(timeout_seconds=0.6)
        assert len(await ids_found(memory, "insights", "fry")) == 1
        assert not memory.index.has_vectors


async def test_words_that_all_rows_have_count_only_without_vectors(memory: Memory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("memory.search.text_index.MAX_ROWS", 5)
    await memory.insights.apply([add(f"fry the carrot in pan {number}") for number in range(9)])
    await memory.index.drain()
    monkeypatch.setattr(memory.index._vector_index, "find", lambda *_, **__: [])
    assert await ids_found(memory, "insights", "fry carrot") == []
    assert len(await ids_found(memory, "insights", "fry carrot pan 7")) == 1
    monkeypatch.setattr(MemoryIndex, "has_vectors", False)
    assert len(await ids_found(memory, "insights", "fry carrot pan 7")) > 1


@pytest.mark.parametrize("most_compared", [1, 256])
async def test_rows_found_by_word_alone_have_their_true_similarity(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, most_compared: int
):
    for module in ("memory.search.index", "memory.search.vector_index"):
        monkeypatch.setattr(f"{module}.MAX_COMPARED", most_compared)
    texts = ["fry the carrot", "carrot soup with onion and salt", "a carrot grows in loose soil", "fry onion in oil"]
    await memory.insights.apply([add(text) for text in texts])
    await memory.index.drain()
    matches, num_rows = await memory.index.match("insights", "fry carrot onion", num=1)
    with memory.database.read() as session:
        told = {insight.id: insight.text for insight in session.exec(select(Insight))}
    question, *vectors = HashingEncoder().encode(["fry carrot onion", *texts])
    true = {
        text: pytest.approx(float(vector @ question), abs=1e-5) for text, vector in zip(texts, vectors, strict=True)
    }
    assert {told[match.row_id]: match.similarity for match in matches} == true
    assert num_rows == len(texts) and all(match.word_match.coverage > 0 for match in matches)


async def test_rows_found_by_word_alone_are_left_out_where_they_cannot_be_compared(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_, **__):
        raise IndexDamaged("gone in between")

    await memory.insights.apply([add("fry the carrot"), add("fry the onion in oil")])
    await memory.index.drain()
    monkeypatch.setattr(memory.index._vector_index, "compare", fail)
    matches, _ = await memory.index.match("insights", "fry carrot", num=1)
    assert len(matches) == 1 and matches[0].similarity is not None


def test_fusion_favours_what_both_found():
    assert [row_id for row_id, _ in fuse(["a", "b"], ["b", "c"])] == ["b", "a", "c"]
    assert fuse([], []) == []
