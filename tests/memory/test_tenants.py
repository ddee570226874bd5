"""No tenant finds another's rows: by id, in lists, by text or by vectors."""

from __future__ import annotations

import random

import pytest

from memory.errors import UnknownDocument, UnknownResponse, UnknownTrajectory
from memory.records.insights import InsightOperation, OperationKind
from memory.schema import Feedback, Split, Step, StepKind, StoredResponse, TrajectoryStage
from memory.search.index import MemoryIndex
from memory.search.relevance import WordMatches
from memory.store import Memory
from tests.memory.episodes import command_call, open_trajectory, play

TENANTS = ("", "acme", "zeta")
KITCHEN = {"environment": "kitchen", "kind": "cooking"}


def learn(text: str, tenant: str) -> InsightOperation:
    return InsightOperation(OperationKind.ADD, "kitchen", "cooking", text, tenant=tenant)


@pytest.mark.parametrize("blind_to", ["nothing", "text", "vectors"])
async def test_retrieval_shows_a_tenant_its_own_and_nothing_else(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, blind_to: str
):
    for tenant in TENANTS:
        name = tenant or "default"
        await play(memory, task="t1", task_text=f"how to fry on the {name} stove", tenant=tenant)
        await memory.insights.apply([learn(f"{name}: fry on the stove {n}", tenant) for n in range(14)])
        await memory.documents.ingest("Stove", f"How to fry on it, says {name}.", tenant=tenant)
    await memory.index.drain()
    if blind_to == "text":
        monkeypatch.setattr(memory.index._text_index, "match", lambda *_, **__: WordMatches([], 0))
    elif blind_to == "vectors":
        monkeypatch.setattr(MemoryIndex, "has_vectors", False)
    for tenant in TENANTS:
        found = await memory.retrieval.retrieve(
            **KITCHEN, query_text="how to fry on the stove", budget_tokens=5000, tenant=tenant
        )
        shown = {name for name in ("default", "acme", "zeta") if name in found.text}
        assert shown == {tenant or "default"}
        assert all(part in found.text for part in ("Insights:", "Solved before:", "Passages:"))
        (passage,) = await memory.retrieval.find_passages("how to fry", 10, tenant=tenant)
        assert passage == f"Stove: How to fry on it, says {tenant or 'default'}."
    assert (await memory.retrieval.retrieve(**KITCHEN, query_text="fry on the stove", tenant="nobody")).text == ""


async def test_an_index_that_is_behind_shows_nothing_of_others(memory: Memory, monkeypatch: pytest.MonkeyPatch):
    theirs = await play(memory, task_text="fry the carrot", tenant="acme")
    document = await memory.documents.ingest("Stove", "How to fry.", tenant="acme")
    passage = memory.documents.passages(document.id, tenant="acme")[0]
    found = {"exemplars": [(theirs.id, 1.0)], "passages": [(passage.id, 1.0)], "insights": []}

    async def find_wrongly(collection: str, *_, **__):
        return found[collection]

    monkeypatch.setattr(memory.index, "find", find_wrongly)
    assert (await memory.retrieval.retrieve(**KITCHEN, query_text="fry")).text == ""


async def test_the_same_title_text_and_id_may_be_in_two_tenants(memory: Memory):
    first, second = [await memory.documents.ingest("Stove", "How to fry.", tenant=it) for it in ("acme", "zeta")]
    assert first.id != second.id
    await memory.documents.ingest("Stove", "How to bake.", tenant="zeta")
    assert memory.documents.select(tenant="acme") == [first] and memory.documents.select() == []
    changed = await memory.insights.apply([learn("fry it", "acme"), learn("fry it", "zeta"), learn("fry it", "acme")])
    assert {(it.tenant, it.strength) for it in changed} == {("acme", 3), ("zeta", 2)}
    for tenant in ("acme", "zeta"):
        target = await play(memory, tenant=tenant, reward=None)
        said = Feedback(tenant=tenant, id="ticket-1", trajectory_id=target.id, value=tenant)
        kept, is_new = await memory.feedback.post(said)
        assert is_new and kept.value == tenant


async def test_what_is_another_tenants_is_not_there(memory: Memory):
    theirs = await play(memory, tenant="acme", reward=None)
    document = await memory.documents.ingest("Stove", "How to fry.", tenant="acme")
    await memory.responses.save(StoredResponse(id="resp_1", tenant="acme", trajectory_id=theirs.id))
    await memory.responses.save(
        StoredResponse(id="resp_2", tenant="zeta", trajectory_id=theirs.id, previous_id="resp_1")
    )
    with pytest.raises(UnknownTrajectory, match="list them"):
        memory.trajectories.get(theirs.id, tenant="zeta")
    with pytest.raises(UnknownTrajectory, match="existing target"):
        await memory.feedback.post(Feedback(id="", tenant="zeta", trajectory_id=theirs.id, value=True))
    for ask in (memory.documents.get, memory.documents.passages):
        with pytest.raises(UnknownDocument):
            ask(document.id, tenant="zeta")
    with pytest.raises(UnknownDocument):
        await memory.documents.remove(document.id, tenant="zeta")
    for ask in (memory.responses.get, memory.responses.conversation):
        with pytest.raises(UnknownResponse):
            ask("resp_1", tenant="zeta")
    with pytest.raises(UnknownResponse):  # also through a link to it
        memory.responses.conversation("resp_2", tenant="zeta")
    with pytest.raises(UnknownResponse):
        await memory.responses.delete("resp_1")
    assert memory.trajectories.select() == [] and len(memory.trajectories.select(tenant="acme")) == 1
    assert memory.trajectories.newest_of(theirs.episode_id, tenant="zeta") is None


async def test_a_recorded_result_is_the_tenants_that_asked_for_it(memory: Memory):
    trajectory = await open_trajectory(memory, tenant="acme", split=Split.LIVE, tools=[{"function": {"name": "act"}}])
    asked = command_call("look")
    for step in (
        Step(trajectory_id=trajectory.id, position=0, kind=StepKind.MODEL, tool_calls=[asked]),
        Step(
            trajectory_id=trajectory.id,
            position=1,
            kind=StepKind.TOOL,
            tool_name="act",
            tool_call_id=asked["id"],
            content="their order",
        ),
    ):
        await memory.trajectories.append(step, trajectory=trajectory)
    assert memory.trajectories.recorded_result("act", {"command": "look"}, tenant="acme") == "their order"
    assert memory.trajectories.recorded_result("act", {"command": "look"}) is None


async def test_any_order_of_writes_leaks_nothing(memory: Memory):
    """60 writes of three tenants in a random order, each with its tenant's mark; then each tenant reads everything."""
    choose = random.Random(7)
    for number in range(60):
        tenant = choose.choice(TENANTS)
        mark = f"mark{tenant or 'default'}"
        match choose.randrange(3):
            case 0:
                await memory.insights.apply([learn(f"fry {mark} number {number % 9}", tenant)])
            case 1:
                await memory.documents.ingest(f"Note {number % 5}", f"fry {mark} {number}", tenant=tenant)
            case 2:
                await play(
                    memory, task=f"t{number}", task_text=f"fry {mark}", tenant=tenant, stage=TrajectoryStage.FINISHED
                )
    await memory.index.drain()
    assert await memory.index.rebuild() == memory.index.count()
    for tenant in TENANTS:
        others = {f"mark{it or 'default'}" for it in TENANTS} - {f"mark{tenant or 'default'}"}
        retrieved = await memory.retrieval.retrieve(
            **KITCHEN, query_text="fry mark", budget_tokens=50_000, tenant=tenant
        )
        texts = [
            retrieved.text,
            *(view.trajectory.task_text for view in memory.trajectories.select(tenant=tenant, limit=500)),
            *(insight.text for insight in memory.insights.active(tenant=tenant)),
            *await memory.retrieval.find_passages("fry mark", 50, tenant=tenant),
        ]
        assert len(texts) > 5 and not any(mark in text for mark in others for text in texts)
