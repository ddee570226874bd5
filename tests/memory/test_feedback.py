"""What people say of an episode, once each."""

from __future__ import annotations

import asyncio

import pytest

from memory.errors import FeedbackConflict, UnknownTrajectory
from memory.schema import Feedback, RewardSource
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
    (kept,) = memory.feedback.list(trajectory.id)
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
    assert memory.feedback.list(trajectory.id) == [] and memory.trajectories.rewards(trajectory.id) == []
