"""A corrected answer is never shown as solved: the correction replaces it where it may be shown."""

from __future__ import annotations

from typing import Any

import pytest

from memory.errors import IllegalMove
from memory.schema import Feedback, Scope, Split, Step, StepKind, Trajectory, TrajectoryStage
from memory.store import Memory
from tests.memory.episodes import open_trajectory

LIVE = {"environment": None, "kind": "chat"}
QUESTION = "when is the invoice of the stove due"


async def talk(memory: Memory, *replies: str, value: bool | None = True, **whose: Any) -> Trajectory:
    """Store a rated chat of this many replies."""
    opening = [{"role": "user", "content": QUESTION}]
    fields = {"split": Split.LIVE, "opening": opening, "task_text": QUESTION, "user_id": "jane"}
    trajectory = await open_trajectory(memory, **LIVE, **fields | whose)
    for position, reply in enumerate(replies):
        step = Step(trajectory_id=trajectory.id, position=position, kind=StepKind.MODEL, content=reply)
        await memory.trajectories.append(step, trajectory=trajectory)
    closed = await memory.trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED, answer=replies[-1])
    if value is not None:
        await memory.feedback.post(Feedback(trajectory_id=trajectory.id, tenant=trajectory.tenant, value=value))
    return closed


async def correct(memory: Memory, trajectory: Trajectory, text: str, **more: Any) -> None:
    fields = {"trajectory_id": trajectory.id, "tenant": trajectory.tenant, "correction": text}
    await memory.feedback.post(Feedback(**fields | more))


async def shown(memory: Memory, user_id: str = "jane", **more: Any) -> str:
    await memory.index.drain()
    found = await memory.retrieval.retrieve(**LIVE, query_text=QUESTION, user_id=user_id, budget_tokens=5_000, **more)
    return found.text


@pytest.mark.parametrize("value", [True, False, None])
async def test_the_correction_is_shown_in_place_of_the_wrong_answer(memory: Memory, value: bool | None):
    trajectory = await talk(memory, "On May 9.", value=value)
    await correct(memory, trajectory, "On May 2.")
    assert await shown(memory) == f"<memory>\nSolved before:\n{QUESTION}\nOn May 2.\n</memory>"
    assert await shown(memory, "john") == ""
    await correct(memory, trajectory, "On May 3.")
    assert "On May 3." in await shown(memory) and "On May 2." not in await shown(memory)


async def test_a_correction_before_the_end_counts(memory: Memory):
    trajectory = await open_trajectory(memory, **LIVE, split=Split.LIVE, task_text=QUESTION, user_id="jane")
    step = Step(trajectory_id=trajectory.id, position=0, kind=StepKind.MODEL, content="On May 9.")
    await memory.trajectories.append(step, trajectory=trajectory)
    await correct(memory, trajectory, "On May 2.")
    assert await shown(memory) == ""
    await memory.trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED, answer="On May 9.")
    assert "On May 2." in await shown(memory)


async def test_an_episode_that_was_built_on_a_wrong_reply_is_shown_to_nobody(memory: Memory):
    trajectory = await talk(memory, "Which invoice?", "On May 9.")
    assert "On May 9." in await shown(memory)
    await correct(memory, trajectory, "Let me look.", step=0)
    assert await shown(memory) == ""
    (listed,) = memory.reviews.exemplars(tenant="")
    assert listed.scope is None and listed.text == ""
    with pytest.raises(IllegalMove, match="approve it with a text"):
        await memory.reviews.approve_exemplar(trajectory.id, tenant="")
    assert await shown(memory, "john") == ""
    await memory.reviews.approve_exemplar(trajectory.id, tenant="", text="Look into the book.")
    assert "Look into the book." in await shown(memory, "john")


async def test_words_of_another_person_are_not_shown(memory: Memory):
    trajectory = await talk(memory, "On May 9.")
    await correct(memory, trajectory, "John says May 2.", user_id="john")
    assert await shown(memory) == "" and await shown(memory, "john") == ""


async def test_a_whole_tenant_is_shown_corrections_of_those_alone_who_may_teach(memory: Memory):
    shop, _ = await memory.keys.create("shop", scopes=[Scope.FEEDBACK], tenant="acme")
    tutor, _ = await memory.keys.create("tutor", scopes=[Scope.FEEDBACK, Scope.TEACH], tenant="acme")
    trajectory = await talk(memory, "On May 9.", user_id="", is_shared=True, tenant="acme")
    await correct(memory, trajectory, "Never pay.", key_id=shop.id)
    assert await shown(memory, "", tenant="acme") == ""
    await correct(memory, trajectory, "On May 2.", key_id=tutor.id)
    assert "On May 2." in await shown(memory, "", tenant="acme")


async def test_an_approval_speaks_for_what_was_there_by_then(memory: Memory):
    trajectory = await talk(memory, "On May 9.")
    await memory.reviews.approve_exemplar(trajectory.id, tenant="", text="It is May 9.")
    assert "It is May 9." in await shown(memory, "john")
    await correct(memory, trajectory, "On May 2.")
    assert await shown(memory, "john") == "" and await shown(memory) == ""
    await memory.reviews.approve_exemplar(trajectory.id, tenant="")
    assert "On May 2." in await shown(memory, "john")


async def test_a_text_that_was_edited_is_replaced_by_a_later_correction(memory: Memory):
    trajectory = await talk(memory, "On May 9.")
    await memory.reviews.edit_exemplar(trajectory.id, "It is May 9.", tenant="")
    assert "It is May 9." in await shown(memory) and await shown(memory, "john") == ""
    await correct(memory, trajectory, "On May 2.")
    assert "On May 2." in await shown(memory)
    with pytest.raises(IllegalMove, match="was corrected: approve it with a text"):
        await memory.reviews.edit_exemplar(trajectory.id, "It is May 9.", tenant="")


async def test_a_corrected_chat_that_is_retired_is_shown_to_nobody(memory: Memory):
    trajectory = await talk(memory, "On May 9.", value=False)
    await correct(memory, trajectory, "On May 2.")
    assert "On May 2." in await shown(memory)
    await memory.reviews.retire_exemplar(trajectory.id, tenant="")
    assert await shown(memory) == ""
