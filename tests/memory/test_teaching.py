"""Which feedback may teach the weights, which serve every tenant."""

from __future__ import annotations

import pytest

from memory.schema import Feedback, TrajectoryStage
from memory.store import Memory
from memory.teaching import Teacher, TeacherKind, teaches
from tests.memory.episodes import play


async def give(memory: Memory, trajectory, value: float | None = 1.0, **more) -> None:
    await memory.feedback.post(Feedback(trajectory_id=trajectory.id, tenant=trajectory.tenant, value=value, **more))


async def key_of(memory: Memory, *scopes: str, tenant: str = "") -> str:
    row, _ = await memory.keys.create("somebody", scopes, tenant=tenant)
    return row.id


def taught(memory: Memory) -> dict[str, float]:
    return {each.trajectory.id: each.reward for each in memory.trajectories.learnable(is_for_weights=True)}


@pytest.mark.parametrize(
    ("tenant", "scopes", "does_teach"),
    [
        ("", ["infer", "feedback"], False),
        ("", ["feedback", "teach"], True),
        ("", ["admin"], True),
        ("shop", ["infer", "feedback"], False),
        ("shop", ["feedback", "teach"], True),
        ("shop", ["admin"], False),
    ],
)
async def test_feedback_counts_for_the_weights_by_the_scope_of_its_key(memory: Memory, tenant, scopes, does_teach):
    trajectory = await play(memory, reward=None, environment=None, tenant=tenant)
    await give(memory, trajectory, key_id=await key_of(memory, *scopes, tenant=tenant))

    assert (trajectory.id in taught(memory)) == does_teach
    assert [each.trajectory.id for each in memory.trajectories.learnable()] == [trajectory.id]
    assert memory.trajectories.count_learnable() == {"": 1}
    assert memory.trajectories.count_learnable(is_for_weights=True) == ({"": 1} if does_teach else {})


@pytest.mark.parametrize(("tenant", "does_teach"), [("", True), ("shop", False)])
async def test_feedback_without_a_key_counts_for_the_weights_in_the_default_tenant_only(
    memory: Memory, tenant: str, does_teach: bool
):
    trajectory = await play(memory, reward=None, environment=None, tenant=tenant)
    await give(memory, trajectory)
    assert (trajectory.id in taught(memory)) == does_teach


async def test_a_revoked_key_takes_back_nothing_that_it_taught(memory: Memory):
    trajectory = await play(memory, reward=None)
    key_id = await key_of(memory, "feedback", "teach")
    await give(memory, trajectory, key_id=key_id)
    await memory.keys.revoke(key_id)
    assert taught(memory) == {trajectory.id: 1.0}


async def test_whoever_does_not_teach_cannot_overrule_the_environment_for_the_weights(memory: Memory):
    lost = await play(memory, reward=0.0)
    await give(memory, lost, 1.0, key_id=await key_of(memory, "feedback"))
    assert memory.trajectories.effective_reward(lost.id) == 1.0
    assert taught(memory) == {lost.id: 0.0}


async def test_what_another_tenants_environment_measured_counts_for_the_weights_by_the_key_that_asked(memory: Memory):
    theirs = await play(memory, tenant="shop", key_id=await key_of(memory, "infer", tenant="shop"))
    asked = await play(memory, tenant="shop", key_id=await key_of(memory, "infer", "teach", tenant="shop"))
    ours = await play(memory, key_id=await key_of(memory, "infer"))
    assert taught(memory).keys() == {asked.id, ours.id} and theirs.id not in taught(memory)


async def test_the_teacher_is_whoever_gave_the_reward_that_counts(memory: Memory):
    key_id = await key_of(memory, "feedback", "teach")
    praised = await play(memory, user_id="anna")
    await give(memory, praised, 0.0, key_id=key_id)
    judged = await play(memory, user_id="anna")
    await give(memory, judged, 0.0, key_id=key_id, user_id="ben")
    measured = await play(memory)

    teachers = {it.trajectory.id: it.teacher for it in memory.trajectories.learnable(is_for_weights=True)}
    assert teachers == {
        praised.id: Teacher("", key_id, "anna"),
        judged.id: Teacher("", key_id, "ben"),
        measured.id: Teacher(kind=TeacherKind.ENVIRONMENT),
    }


async def test_a_strangers_correction_does_not_displace_a_teachers(memory: Memory):
    trajectory = await play(memory, reward=None)
    key_id = await key_of(memory, "feedback", "teach")
    await give(memory, trajectory, None, key_id=key_id, correction="The teacher's words.")
    await give(memory, trajectory, None, key_id=await key_of(memory, "feedback"), correction="Pay me.")

    (correction,) = memory.feedback.corrections(limit=10, is_for_weights=True)
    assert (correction.text, correction.teacher.key_id) == ("The teacher's words.", key_id)
    assert [each.text for each in memory.feedback.corrections(limit=10)] == ["Pay me."]
    assert memory.feedback.count_corrections_without_teacher() == 1


async def test_late_feedback_of_a_teacher_counts_as_new(memory: Memory):
    old = await play(memory, reward=None)
    since = old.closed_at
    await give(memory, old)
    found = memory.trajectories.learnable(since=since, is_for_weights=True)
    assert [each.trajectory.id for each in found] == [old.id] and old.stage is TrajectoryStage.FINISHED


async def test_a_key_says_whether_it_teaches(memory: Memory):
    row, key = await memory.keys.create("app", ["teach", "feedback"])
    assert row.scopes == ["feedback", "teach"] and teaches(memory.keys.find(key))
