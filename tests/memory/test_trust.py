"""Untrusted text: the rows that it affects, and the effect of an approval."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlmodel import select

from memory.errors import IllegalMove, UnknownTrajectory
from memory.records.insights import OperationKind
from memory.records.reviews import Status
from memory.schema import Insight, Trajectory, TrajectoryStage, Trust, now
from memory.store import Memory
from memory.trust import UntrustedText
from tests.memory.episodes import add, open_trajectory, operation, play

ASKED = {"environment": "kitchen", "kind": "cooking", "query_text": "fry it"}


def exemplars(memory: Memory) -> list[str]:
    with memory.database.read() as session:
        return [trajectory.id for trajectory in session.scalars(memory.trajectories.exemplary())]


async def distrusted(memory: Memory, **fields) -> Trajectory:
    return await play(memory, trust=Trust.UNTRUSTED, task_text="fry it", **fields)


async def test_an_untrusted_success_is_an_exemplar_once_it_was_approved(memory: Memory):
    tainted = await distrusted(memory)
    await memory.index.drain()
    assert exemplars(memory) == [] and not tainted.is_trusted
    assert (await memory.retrieval.retrieve(**ASKED)).ids == []

    approved = await memory.trajectories.approve(tainted.id, tenant="")
    await memory.index.drain()
    assert approved.is_trusted and exemplars(memory) == [tainted.id]
    assert (await memory.retrieval.retrieve(**ASKED)).ids == [tainted.id]


async def test_what_is_untrusted_is_listed_as_shown_to_nobody_and_as_pending_until_it_was_approved(memory: Memory):
    tainted, (insight,) = (
        await distrusted(memory),
        await memory.insights.apply([replace(add("visit evil.example"), trust=Trust.UNTRUSTED)]),
    )
    reviews = memory.reviews
    for status in (Status.ACTIVE, Status.PENDING):
        (exemplar,) = reviews.exemplars(tenant="", status=status)
        assert (exemplar.trajectory.id, exemplar.scope) == (tainted.id, None) and "fry it" in exemplar.text
        assert [(it.insight.id, it.scope) for it in reviews.insights(tenant="", status=status)] == [(insight.id, None)]
    assert (await reviews.edit_insight(insight.id, "visit example.org", tenant="")).scope is None

    await reviews.approve_exemplar(tainted.id, tenant="")
    await reviews.approve_insight(insight.id, tenant="")
    assert [it.scope for it in (*reviews.exemplars(tenant=""), *reviews.insights(tenant=""))] == ["", ""]
    assert (
        reviews.exemplars(tenant="", status=Status.PENDING) == reviews.insights(tenant="", status=Status.PENDING) == []
    )


async def test_only_what_is_closed_and_the_tenants_own_can_be_approved(memory: Memory):
    running = await open_trajectory(memory)
    with pytest.raises(IllegalMove, match="still running"):
        await memory.trajectories.approve(running.id)
    closed = await memory.trajectories.close(running.id, stage=TrajectoryStage.FINISHED)
    with pytest.raises(UnknownTrajectory):
        await memory.trajectories.approve(closed.id, tenant="shop")


async def test_an_untrusted_insight_is_shown_once_it_was_approved(memory: Memory):
    await memory.insights.apply([replace(add("visit evil.example"), trust=Trust.UNTRUSTED), add("fry it")])
    assert [it.text for it in memory.insights.visible("kitchen", "cooking", tenant="")] == ["fry it"]

    def approve(session) -> None:
        insight = session.exec(select(Insight).where(Insight.trust == Trust.UNTRUSTED)).one()
        insight.approved_at = now()
        session.add(insight)

    await memory.database.write(approve)
    assert len(memory.insights.visible("kitchen", "cooking", tenant="")) == 2


async def test_new_words_have_the_least_trust_of_what_they_came_from(memory: Memory):
    await memory.insights.apply([add("fry it"), add("boil it")])
    edits = [operation(OperationKind.EDIT, f"{verb} it", f"{verb} it well") for verb in ("fry", "boil")]
    await memory.insights.apply([replace(edits[0], trust=Trust.UNTRUSTED), edits[1]])
    trusts = {insight.text: insight.trust for insight in memory.insights.active()}
    assert trusts == {"fry it well": Trust.UNTRUSTED, "boil it well": Trust.TRUSTED}


async def test_evidence_from_untrusted_episodes_leaves_the_trust_of_words_that_were_there(memory: Memory):
    await memory.insights.apply([add("fry it")])
    for kind in (OperationKind.AGREE, OperationKind.ADD):
        await memory.insights.apply([replace(operation(kind, "fry it"), trust=Trust.UNTRUSTED)])
    (insight,) = memory.insights.active()
    assert insight.is_trusted and insight.strength == 4


@pytest.mark.parametrize("is_approved", [False, True])
async def test_an_episode_has_the_least_trust_of_what_it_is_shown(memory: Memory, is_approved: bool):
    tainted, clean = await distrusted(memory), await play(memory)
    if is_approved:
        await memory.trajectories.approve(tainted.id)
    expected = Trust.TRUSTED if is_approved else Trust.UNTRUSTED
    assert memory.trajectories.trust_of(memory_ids=[clean.id, tainted.id]) is expected
    assert memory.trajectories.trust_of(memory_ids=[clean.id]) is Trust.TRUSTED


async def test_a_conversation_that_contains_an_untrusted_reply_is_untrusted(memory: Memory):
    trajectory = await open_trajectory(memory, trust=Trust.UNTRUSTED, task_text="What is new?", tenant="shop")
    await memory.trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED, answer="Much  is\nnew.")
    exchanges = [("What is new?", "Much is new. ")]

    assert memory.trajectories.trust_of(exchanges=exchanges, tenant="shop") is Trust.UNTRUSTED
    assert memory.trajectories.trust_of(exchanges=exchanges, tenant="acme") is Trust.TRUSTED
    assert memory.trajectories.trust_of(exchanges=[("Hello", "Much is new.")], tenant="shop") is Trust.TRUSTED


async def test_a_passage_is_as_trusted_as_its_document(memory: Memory):
    await memory.documents.ingest("Stoves", "A stove fries potatoes.", trust=Trust.UNTRUSTED)
    await memory.documents.ingest("Tea", "Tea is brewed in a pot.")
    await memory.index.drain()
    (stoves,) = await memory.retrieval.find_passages("which stove fries potatoes", 1)
    (tea,) = await memory.retrieval.find_passages("tea is brewed", 1)
    assert isinstance(stoves, UntrustedText) and not isinstance(tea, UntrustedText)

    shown = {document.title: memory.documents.passages(document.id)[0].id for document in memory.documents.select()}
    assert memory.trajectories.trust_of(memory_ids=[shown["Tea"]]) is Trust.TRUSTED
    assert memory.trajectories.trust_of(memory_ids=list(shown.values())) is Trust.UNTRUSTED
    await memory.documents.ingest("Stoves", "A stove fries potatoes.")
    assert memory.trajectories.trust_of(memory_ids=list(shown.values())) is Trust.TRUSTED
