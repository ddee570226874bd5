"""Scopes of memories under both settings, in the rows and in the index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from memory.config import MemoryConfig
from memory.errors import IllegalMove, UnknownInsight, UnknownTrajectory
from memory.records.insights import InsightOperation, OperationKind
from memory.records.reviews import Status
from memory.schema import Split, Trajectory, now
from memory.store import Memory
from tests.memory.episodes import HashingEncoder, play

LIVE = {"environment": None, "kind": "chat"}


async def talk(memory: Memory, text: str, **whose: Any) -> Trajectory:
    opening = [{"role": "user", "content": text}]
    return await play(memory, task_text=text, split=Split.LIVE, opening=opening, **LIVE, **whose)


async def shown(memory: Memory, text: str, user_id: str = "", **more: Any) -> str:
    found = await memory.retrieval.retrieve(**LIVE, query_text=text, user_id=user_id, budget_tokens=5_000, **more)
    return found.text


def lesson(text: str, user_id: str = "", *, is_shared: bool = False, kind: OperationKind = OperationKind.ADD, **more):
    return InsightOperation(kind, "", "chat", text, user_id=user_id, is_shared=is_shared, **more)


async def test_a_persons_own_rows_are_found_among_many_of_others(memory: Memory):
    mine = await talk(memory, "please fry my carrot", user_id="jane")
    for number in range(40):
        await talk(memory, "please fry my carrot", user_id=f"person {number % 7}")
    await memory.index.drain()
    found = await memory.retrieval.retrieve(**LIVE, query_text="please fry my carrot", user_id="jane")
    assert found.ids == [mine.id]
    assert await shown(memory, "please fry my carrot", "somebody else") == ""


async def test_what_a_person_did_long_ago_is_found_by_its_rare_words(memory: Memory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("memory.search.index.MAX_OWN", 2)
    old = await talk(memory, "please fry my saffron carrot", user_id="jane")
    await memory.index.drain()
    for number in range(6):
        await talk(memory, f"when is the invoice number {number} due", user_id="jane")
    await memory.index.drain()
    found = await memory.retrieval.retrieve(**LIVE, query_text="please fry my saffron carrot", user_id="jane")
    assert found.ids == [old.id]


async def test_the_setting_widens_and_narrows_what_is_there_already(tmp_path: Path, config: MemoryConfig):
    tenant_wide = config.model_copy(update={"share_live": "tenant"})
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        await talk(memory, "please fry my carrot", user_id="jane")
        await memory.insights.apply([lesson("jane fries", "jane"), lesson("made before persons were known")])
        assert await shown(memory, "please fry my carrot") == ""
    with Memory.open(tmp_path, tenant_wide, encoder=HashingEncoder()) as memory:
        await memory.index.drain()
        text = await shown(memory, "please fry my carrot", "bob")
        assert all(part in text for part in ("Solved before:", "jane fries", "before persons were known"))
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        await memory.index.drain()
        assert await shown(memory, "please fry my carrot", "bob") == ""
        assert "jane fries" in await shown(memory, "please fry my carrot", "jane")


async def test_an_approval_moves_a_row_in_both_indexes_and_a_rebuild_agrees(memory: Memory):
    mine = await talk(memory, "please fry my carrot", user_id="jane")
    await memory.index.drain()
    await memory.reviews.approve_exemplar(mine.id, tenant="")
    await memory.index.drain()
    before = await shown(memory, "please fry my carrot", "bob")
    assert "carrot" in before and memory.index._vector_index.count()["exemplars"] == 1
    await memory.index.rebuild()
    assert await shown(memory, "please fry my carrot", "bob") == before


async def test_an_unlike_request_finds_no_exemplar_though_it_shares_a_rare_word(memory: Memory):
    await talk(memory, "please fry my carrot on the stove with oil and salt for twelve minutes", user_id="jane")
    await memory.index.drain()
    assert await shown(memory, "write a haiku of a carrot", "jane") == ""


async def test_shared_words_that_a_persons_episodes_reworded_are_shared_no_more(memory: Memory):
    await memory.insights.apply([lesson("be brief", is_shared=True)])
    assert "be brief" in await shown(memory, "hi")
    await memory.insights.apply([lesson("be brief", kind=OperationKind.EDIT, new_text="be brief with jane")])
    assert await shown(memory, "hi") == ""
    await memory.insights.apply([lesson("be brief with jane", is_shared=True)])
    assert "be brief with jane" in await shown(memory, "hi")  # a shared insight in its own right


async def test_evidence_does_not_reword_what_was_approved_nor_bring_back_what_was_retired(memory: Memory):
    (hers,) = await memory.insights.apply([lesson("be brief", "jane")])
    approved = await memory.reviews.approve_insight(hers.id, tenant="", key_id="key_1", text="answer in one line")
    await memory.insights.apply(
        [lesson("answer in one line", kind=OperationKind.EDIT, new_text="call her Jane"), lesson("be brief", "jane")]
    )
    assert [it.text for it in memory.insights.active(user_id="")] == ["answer in one line"]
    assert "be brief" in await shown(memory, "hi", "jane")
    (review,) = memory.reviews.of(approved.id, tenant="")
    assert (review.key_id, review.user_id, review.text) == ("key_1", "jane", "answer in one line")

    await memory.reviews.retire_insight(approved.id, tenant="")
    again = [lesson("Answer in one line"), lesson("answer in one line", "jane")]
    again.append(lesson("be brief", "jane", kind=OperationKind.EDIT, new_text="answer in one line"))
    assert await memory.insights.apply(again) == []
    assert [it.insight.id for it in memory.reviews.insights(tenant="", status=Status.RETIRED)] == [approved.id]
    with pytest.raises(IllegalMove, match="was retired: only an active one"):
        await memory.reviews.approve_insight(approved.id, tenant="")


async def test_an_approved_insight_joins_the_one_that_says_the_same(memory: Memory):
    (all_know,) = await memory.insights.apply([lesson("be brief", is_shared=True)])
    (hers,) = await memory.insights.apply([lesson("Be brief", "jane")])
    approved = await memory.reviews.approve_insight(hers.id, tenant="")
    assert approved.id == all_know.id
    assert [it.insight.id for it in memory.reviews.insights(tenant="")] == [all_know.id]
    (other,) = await memory.insights.apply([lesson("be kind", is_shared=True)])
    with pytest.raises(IllegalMove, match="retire one of the two"):
        await memory.reviews.edit_insight(other.id, "be  Brief", tenant="")


async def test_another_tenant_decides_about_nothing(memory: Memory):
    mine = await talk(memory, "please fry my carrot", user_id="jane")
    (insight,) = await memory.insights.apply([lesson("be brief", "jane")])
    reviews = memory.reviews
    for decide in (reviews.approve_exemplar, reviews.retire_exemplar):
        with pytest.raises(UnknownTrajectory):
            await decide(mine.id, tenant="acme")
    for decide in (reviews.approve_insight, reviews.retire_insight):
        with pytest.raises(UnknownInsight):
            await decide(insight.id, tenant="acme")
    assert reviews.insights(tenant="acme") == reviews.exemplars(tenant="acme") == []


async def test_what_is_no_success_cannot_be_approved(memory: Memory):
    lost = await play(memory, reward=0.0, split=Split.LIVE, user_id="jane", **LIVE)
    with pytest.raises(IllegalMove, match="is no exemplar"):
        await memory.reviews.approve_exemplar(lost.id, tenant="")
    with pytest.raises(ValueError, match="needs a text"):
        await memory.reviews.approve_exemplar(lost.id, tenant="", text=" ")
    with pytest.raises(ValueError, match="no exemplar is ever 'removed'"):
        memory.reviews.exemplars(tenant="", status=Status.REMOVED)


@pytest.mark.parametrize("share_live", ["user", "tenant"])
async def test_the_rule_says_the_same_in_python_and_in_sql(tmp_path: Path, config: MemoryConfig, share_live: str):
    config = config.model_copy(update={"share_live": share_live})
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        for environment in (None, "kitchen"):
            for user_id in ("", "jane"):
                for is_shared in (False, True):
                    for retired_at in (None, now()):
                        whose = {"environment": environment, "user_id": user_id, "is_shared": is_shared}
                        await play(memory, retired_at=retired_at, **whose)
        query = select(Trajectory, memory.scopes.of_episode())
        with memory.database.read() as session:
            rows = session.exec(query).all()
    assert len(rows) == 16 and all(memory.scopes.of_trajectory(row) == scope for row, scope in rows)
