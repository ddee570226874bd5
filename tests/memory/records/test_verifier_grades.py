"""A verifier's grade counts for rows of training data, and for nothing else."""

from __future__ import annotations

import pytest

from memory.schema import Reward, RewardSource, Split
from memory.store import Memory
from tests.memory.episodes import play


async def grade_by_verifier(memory: Memory, trajectory_id: str, value: float = 1.0) -> None:
    await memory.trajectories.reward(trajectory_id, value, RewardSource.VERIFIER)


async def test_a_grade_counts_for_training_data_alone(memory: Memory):
    episode = await play(memory, reward=None)
    await grade_by_verifier(memory, episode.id)
    trajectories = memory.trajectories
    (learned,) = trajectories.learnable(is_for_weights=True)
    assert (learned.reward, learned.source) == (1.0, RewardSource.VERIFIER)
    assert trajectories.learnable() == []
    assert trajectories.reward_for_weights(episode.id) is None
    assert trajectories.effective_reward(episode.id) is None
    assert [view.reward for view in trajectories.select(is_for_weights=True)] == [None]
    with memory.database.read() as session:
        assert session.execute(trajectories.exemplary()).all() == []


async def test_every_other_reward_is_trusted_more(memory: Memory):
    for source in set(RewardSource) - {RewardSource.VERIFIER}:
        episode = await play(memory, reward=None)
        await memory.trajectories.reward(episode.id, 0.0, source)
        await grade_by_verifier(memory, episode.id)
        learned = {it.trajectory.id: it for it in memory.trajectories.learnable(is_for_weights=True)}
        assert (learned[episode.id].reward, learned[episode.id].source) == (0.0, source)


async def test_no_verifier_grades_a_held_out_task(memory: Memory):
    episode = await play(memory, reward=None, split=Split.HELD_OUT)
    with pytest.raises(ValueError, match="held-out task: no verifier may grade it"):
        await grade_by_verifier(memory, episode.id)
    # a row written in another way is ignored as well
    await memory.database.write(
        lambda session: session.add(
            Reward(id="rew_1", trajectory_id=episode.id, value=1.0, source=RewardSource.VERIFIER)
        )
    )
    assert memory.trajectories.reward_for_weights(episode.id) is None


async def test_only_episodes_that_nobody_graded_are_left_to_a_verifier(memory: Memory):
    bare = await play(memory, reward=None)
    await play(memory, reward=0.0)
    await play(memory, reward=None, split=Split.HELD_OUT)
    untrusted = await play(memory, reward=None)
    await memory.trajectories.distrust(untrusted.id)
    environment = bare.environment or ""

    def ungraded() -> list[str]:
        return [each.id for each in memory.trajectories.ungraded([environment], limit=10)]

    assert ungraded() == [bare.id]
    assert memory.trajectories.ungraded(["elsewhere"], limit=10) == []
    await grade_by_verifier(memory, bare.id)
    assert ungraded() == []
