"""Feedback on episodes; each post counts once."""

from __future__ import annotations

import asyncio

import pytest

from memory.errors import FeedbackConflict, UnknownStep, UnknownTrajectory
from memory.schema import Feedback, RewardSource, Scope, Split, Step, StepKind, TrajectoryStage
from memory.store import Memory
from tests.memory.episodes import open_trajectory, play


async def test_a_number_becomes_a_users_reward(memory: Memory):
    trajectory = await play(memory, reward=0.0)
    feedback = Feedback(
        id="f1", trajectory_id=trajectory.id, name="helpful", value=True, comment="yes", tags={"a": "b"}
    )
    kept, is_new = await memory.feedback.post(feedback)
    assert is_new and (kept.value, kept.tags) == (True, {"a": "b"})
    reward = memory.trajectories.rewards(trajectory.id)[-1]
    assert (reward.value, reward.source, reward.reason) == (1.0, RewardSource.USER, "helpful: yes")
    assert memory.trajectories.effective_reward(trajectory.id) == 1.0


async def test_words_are_kept_and_reward_nothing(memory: Memory):
    trajectory = await open_trajectory(memory)
    await memory.feedback.post(Feedback(trajectory_id=trajectory.id, value="too long", correction="short"))
    (kept,) = memory.feedback.select(trajectory.id)
    assert (kept.value, kept.correction) == ("too long", "short") and kept.id.startswith("fb_")
    assert memory.trajectories.effective_reward(trajectory.id) is None


async def test_the_same_id_counts_once(memory: Memory):
    trajectory = await play(memory, reward=None)

    def body(value: float) -> Feedback:
        return Feedback(id="f1", trajectory_id=trajectory.id, value=value)

    answers = await asyncio.gather(*(memory.feedback.post(body(0.5)) for _ in range(8)))
    assert sorted(is_new for _, is_new in answers) == [False] * 7 + [True]
    assert len(memory.trajectories.rewards(trajectory.id)) == 1
    with pytest.raises(FeedbackConflict, match="'f1' was posted before with another value"):
        await memory.feedback.post(body(0.6))


async def test_bad_feedback_is_refused_and_leaves_nothing(memory: Memory):
    trajectory = await open_trajectory(memory)
    with pytest.raises(UnknownTrajectory, match="'trj_none'"):
        await memory.feedback.post(Feedback(id="f1", trajectory_id="trj_none", value=1))
    for value in (1.5, -1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            await memory.feedback.post(Feedback(id="f1", trajectory_id=trajectory.id, value=value))
    assert memory.feedback.select(trajectory.id) == [] and memory.trajectories.rewards(trajectory.id) == []


async def test_a_body_is_compared_as_json_after_what_is_no_unicode_was_mended(memory: Memory):
    trajectory = await play(memory, reward=None)
    broken = {"id": "f1", "trajectory_id": trajectory.id, "comment": "half a \ud83d", "tags": {"a": "\ud83d"}}
    await memory.feedback.post(Feedback(**broken, value=True))
    assert (await memory.feedback.post(Feedback(**broken, value=True)))[1] is False
    with pytest.raises(FeedbackConflict, match="another value"):
        await memory.feedback.post(Feedback(**broken, value=1))


async def test_what_is_said_of_one_step_rewards_nothing(memory: Memory):
    trajectory = await play(memory, "look", reward=None)
    kept, _ = await memory.feedback.post(Feedback(trajectory_id=trajectory.id, step=0, value=False))
    assert (kept.step, kept.target) == (0, trajectory.id)
    assert memory.trajectories.rewards(trajectory.id) == []
    with pytest.raises(UnknownStep, match="no step 7"):
        await memory.feedback.post(Feedback(trajectory_id=trajectory.id, step=7, value=False))
    with pytest.raises(ValueError, match="correct a reply of the model"):
        await memory.feedback.post(Feedback(trajectory_id=trajectory.id, step=1, correction="no"))


@pytest.mark.parametrize(("source", "trusted_as"), [("code", "code"), ("judge", "judge"), ("zendesk", "user")])
async def test_a_reward_is_trusted_as_its_poster_is(memory: Memory, source: str, trusted_as: str):
    trajectory = await play(memory, reward=None)
    await memory.feedback.post(Feedback(trajectory_id=trajectory.id, value=0.5, source=source))
    assert memory.trajectories.rewards(trajectory.id)[0].source == trusted_as


async def test_a_correction_speaks_of_the_last_reply_of_what_was_named(memory: Memory):
    trajectory = await open_trajectory(memory)
    for position, digest in ((0, None), (1, "d"), (2, None), (3, None)):
        kind = StepKind.TOOL if position == 2 else StepKind.MODEL
        step = Step(trajectory_id=trajectory.id, position=position, kind=kind, handover_digest=digest)
        await memory.trajectories.append(step, trajectory=trajectory)

    async def correct(text: str, **target) -> None:
        await memory.feedback.post(Feedback(trajectory_id=trajectory.id, correction=text, **target))

    await correct("whole")
    await correct("first answer", answer_start=0)
    await correct("one step", step=0)
    assert memory.feedback.corrections(limit=10) == []  # the episode is still open
    await memory.trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED)
    await correct("second answer", answer_start=2)
    found = [(each.text, each.step.position) for each in memory.feedback.corrections(limit=10)]
    assert found == [("first answer", 1), ("one step", 0), ("second answer", 3)]  # the newest one of each reply


async def test_corrections_of_held_out_tasks_teach_nothing(memory: Memory):
    trajectory = await play(memory, split=Split.HELD_OUT)
    await memory.feedback.post(Feedback(trajectory_id=trajectory.id, correction="open the fridge"))
    assert memory.feedback.corrections(limit=10) == []


async def test_comments_are_listed_by_episode_oldest_first(memory: Memory):
    older, newer = await play(memory), await play(memory)
    for trajectory, comment in ((older, "one"), (newer, "two"), (newer, " "), (newer, None), (newer, "three")):
        await memory.feedback.post(Feedback(trajectory_id=trajectory.id, value=True, comment=comment))
    assert memory.feedback.comments() == {older.id: ["one"], newer.id: ["two", "three"]}
    assert memory.feedback.comments(since_id=newer.id) == {newer.id: ["two", "three"]}


async def test_a_comment_is_listed_only_where_its_writer_may_write_for_all_who_are_shown_the_episode(memory: Memory):
    buttons, _ = await memory.keys.create("buttons", scopes=[Scope.FEEDBACK])
    tutor, _ = await memory.keys.create("tutor", scopes=[Scope.FEEDBACK, Scope.TEACH])
    hers = await play(memory, environment=None, user_id="jane")
    shared = await play(memory, environment=None, user_id="jane", is_shared=True)
    practised = await play(memory)
    for trajectory in (hers, shared, practised):
        for key_id, user_id in ((None, "bob"), (buttons.id, ""), (tutor.id, "")):
            words = f"{user_id}{key_id}"
            comment = Feedback(trajectory_id=trajectory.id, comment=words, key_id=key_id, user_id=user_id)
            await memory.feedback.post(comment)
    assert memory.feedback.comments() == {
        hers.id: [buttons.id, tutor.id],
        shared.id: [tutor.id],
        practised.id: [tutor.id],
    }
