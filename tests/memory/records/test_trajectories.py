"""Trajectories from the first message to the last reward."""

from __future__ import annotations

from dataclasses import astuple
from datetime import timedelta

import pytest

from memory.errors import IllegalMove, UnknownPolicy, UnknownTrajectory
from memory.records.trajectories import measure
from memory.schema import RewardSource, Split, Step, StepKind, Trajectory, TrajectoryStage, now
from memory.store import Memory
from tests.memory.episodes import command_call, open_trajectory, play


async def test_a_trajectory_comes_back_as_it_was_lived(memory: Memory):
    opened = await open_trajectory(
        memory, task="t1", opening=[{"role": "user", "content": "größe 😀"}], memory_ids=["i"]
    )
    call = command_call("open fridge")
    step = Step(
        trajectory_id=opened.id,
        position=0,
        kind=StepKind.MODEL,
        content="I open it.",
        tool_calls=[call],
        prompt_token_ids=[0, 1, 151_643],
        output_token_ids=[4_294_967_295],
        seconds=0.5,
    )
    await memory.trajectories.append(step, trajectory=opened)
    stored = memory.trajectories.steps(opened.id)[0]
    assert (stored.prompt_token_ids, stored.output_token_ids) == ([0, 1, 151_643], [4_294_967_295])
    assert (stored.content, stored.tool_calls, stored.seconds) == ("I open it.", [call], 0.5)
    kept = memory.trajectories.get(opened.id)
    assert kept == opened and kept.opening == [{"role": "user", "content": "größe 😀"}]
    assert kept.opened_at.tzinfo is not None


async def test_the_close_sums_up(memory: Memory):
    closed = await play(memory, "look", "open fridge", reward=None)
    assert (closed.num_steps, closed.prompt_tokens, closed.output_tokens) == (4, 6, 4)
    assert (closed.stage, closed.answer) == (TrajectoryStage.FINISHED, "done")
    assert closed.closed_at >= closed.opened_at


async def test_a_closed_trajectory_takes_no_steps_and_no_second_close(memory: Memory):
    closed = await play(memory)
    late = Step(trajectory_id=closed.id, position=2, kind=StepKind.TOOL)
    with pytest.raises(IllegalMove, match=f"{closed.id}.*takes no more steps"):
        await memory.trajectories.append(late, trajectory=closed)
    with pytest.raises(IllegalMove, match="from 'finished' to 'failed'"):
        await memory.trajectories.close(closed.id, stage=TrajectoryStage.FAILED)
    with pytest.raises(IllegalMove):
        await memory.trajectories.close((await open_trajectory(memory)).id, stage=TrajectoryStage.RUNNING)


async def test_positions_have_neither_gaps_nor_doubles(memory: Memory):
    trajectory = await open_trajectory(memory)
    for wrong in (1, -1):
        with pytest.raises(ValueError, match="out of order: the next position is 0"):
            await memory.trajectories.append(
                Step(trajectory_id=trajectory.id, position=wrong, kind=StepKind.TOOL), trajectory=trajectory
            )
    first = Step(trajectory_id=trajectory.id, position=0, kind=StepKind.TOOL)
    await memory.trajectories.append(first, trajectory=trajectory)
    with pytest.raises(ValueError, match="the next position is 1"):
        await memory.trajectories.append(first, trajectory=trajectory)


async def test_what_does_not_exist_is_named(memory: Memory):
    for ask in (memory.trajectories.get, memory.trajectories.steps, memory.trajectories.effective_reward):
        with pytest.raises(UnknownTrajectory, match="'trj_none'"):
            ask("trj_none")
    with pytest.raises(UnknownTrajectory):
        await memory.trajectories.reward("trj_none", 1.0, RewardSource.USER)
    nowhere = Trajectory(id="trj_none", episode_id="e", policy=0)
    with pytest.raises(UnknownTrajectory):
        await memory.trajectories.append(
            Step(trajectory_id="trj_none", position=0, kind=StepKind.TOOL), trajectory=nowhere
        )
    with pytest.raises(UnknownPolicy, match="version 7"):
        await open_trajectory(memory, policy=7)


async def test_the_newest_reward_of_the_most_trusted_source_counts(memory: Memory):
    closed = await play(memory, reward=None)
    expected = [
        (RewardSource.JUDGE, 0.2, 0.2),
        (RewardSource.ENVIRONMENT, 0.4, 0.4),
        (RewardSource.JUDGE, 1.0, 0.4),
        (RewardSource.CODE, 0.6, 0.6),
        (RewardSource.USER, 0.0, 0.0),
        (RewardSource.USER, 1.0, 1.0),
        (RewardSource.CODE, 0.3, 1.0),
    ]
    assert memory.trajectories.effective_reward(closed.id) is None
    for source, value, effective in expected:
        await memory.trajectories.reward(closed.id, value, source)
        assert memory.trajectories.effective_reward(closed.id) == effective
    assert [reward.value for reward in memory.trajectories.rewards(closed.id)] == [value for _, value, _ in expected]


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf"), "1"])
async def test_a_reward_outside_the_unit_interval_is_refused(memory: Memory, value):
    with pytest.raises(ValueError, match="from 0 to 1"):
        await memory.trajectories.reward("trj", value, RewardSource.USER)


async def test_nothing_is_learned_from_what_is_held_out_failed_or_unrewarded(memory: Memory):
    good = await play(memory, reward=1.0)
    poor = await play(memory, reward=0.5)
    await play(memory, reward=1.0, split=Split.HELD_OUT)
    await play(memory, reward=1.0, stage=TrajectoryStage.FAILED)
    await play(memory, reward=None)
    await open_trajectory(memory)
    graded = memory.trajectories.learnable(since=None, environment="kitchen")
    assert [(it.trajectory.id, it.reward, it.is_success) for it in graded] == [
        (good.id, 1.0, True),
        (poor.id, 0.5, False),
    ]
    assert memory.trajectories.learnable(environment="elsewhere") == []


async def test_since_counts_late_feedback_as_new(memory: Memory):
    old, forgotten = await play(memory), await play(memory)
    since = now()
    assert memory.trajectories.learnable(since=since) == []
    await memory.trajectories.reward(old.id, 0.0, RewardSource.USER, "it was wrong after all")
    assert [it.trajectory.id for it in memory.trajectories.learnable(since=since)] == [old.id]
    everything = memory.trajectories.learnable(since=since - timedelta(hours=1))
    assert [it.trajectory.id for it in everything] == [old.id, forgotten.id]


async def test_the_list_pages_and_filters_newest_first(memory: Memory):
    won = await play(memory, task="t1")
    lost = await play(memory, reward=0.0, environment="garden")
    unjudged = await play(memory, reward=None, split=Split.HELD_OUT)
    running = await open_trajectory(memory)
    ids = [it.trajectory.id for it in memory.trajectories.select()]
    assert set(ids) == {won.id, lost.id, unjudged.id, running.id} and ids == sorted(ids, reverse=True)
    first, rest = memory.trajectories.select(limit=1), memory.trajectories.select(before_id=ids[0])
    assert [it.trajectory.id for it in first + rest] == ids
    for chosen, filters in (
        ({won.id}, {"is_success": True}),
        ({lost.id}, {"is_success": False}),
        ({lost.id}, {"environment": "garden"}),
        ({unjudged.id}, {"split": Split.HELD_OUT}),
        ({running.id}, {"stage": TrajectoryStage.RUNNING}),
        (set(), {"policy": 3}),
    ):
        assert {it.trajectory.id for it in memory.trajectories.select(**filters)} == chosen
    views = {it.trajectory.id: (it.reward, it.is_success) for it in memory.trajectories.select()}
    assert views[won.id] == (1.0, True) and views[lost.id] == (0.0, False) and views[unjudged.id] == (None, None)


async def test_orphans_of_a_dead_process_are_closed_as_failed(memory: Memory):
    orphan, closed = await open_trajectory(memory), await play(memory)
    assert await memory.trajectories.close_orphans() == 1
    assert memory.trajectories.get(orphan.id).error.startswith("Interrupted: ")
    assert memory.trajectories.get(orphan.id).stage is TrajectoryStage.FAILED
    assert memory.trajectories.get(closed.id) == closed
    assert await memory.trajectories.close_orphans() == 0


async def hand_over(memory: Memory, position: int = 0, **fields) -> Trajectory:
    """Return a trajectory whose reply at `position` waits for a client."""
    trajectory = await open_trajectory(memory, **fields)
    for place in range(position + 1):
        digest = "d" if place == position else "earlier"
        step = Step(trajectory_id=trajectory.id, position=place, kind=StepKind.MODEL, handover_digest=digest)
        await memory.trajectories.append(step, trajectory=trajectory)
    return trajectory


async def test_what_waits_for_a_client_is_found_by_what_it_waits_for_and_outlives_the_process(memory: Memory):
    first, second = await hand_over(memory, episode_id="e1"), await hand_over(memory, 1, episode_id="e2")
    running = await open_trajectory(memory)
    trajectories = memory.trajectories
    assert [it.id for it in trajectories.waiting(handover_digest="d")] == [first.id, second.id]
    assert [it.id for it in trajectories.waiting(episode_id="e2")] == [second.id]
    assert trajectories.waiting(handover_digest="earlier") == []  # a resumed trajectory no longer waits
    assert trajectories.waiting(handed_over_before=first.opened_at) == []
    assert await trajectories.close_orphans() == 1
    assert trajectories.get(running.id).stage is TrajectoryStage.FAILED
    assert len(trajectories.waiting()) == 2
    await trajectories.close(first.id, stage=TrajectoryStage.FINISHED)
    assert [it.id for it in trajectories.waiting()] == [second.id]


async def test_results_behind_a_handover_do_not_end_the_waiting(memory: Memory):
    trajectory = await hand_over(memory)
    step = Step(trajectory_id=trajectory.id, position=1, kind=StepKind.TOOL, content="rain")
    await memory.trajectories.append(step, trajectory=trajectory)
    assert [it.id for it in memory.trajectories.waiting(handover_digest="d")] == [trajectory.id]


async def test_a_part_of_a_trajectory_is_measured_and_read_without_its_tokens(memory: Memory):
    trajectory = await play(memory, "look", "take carrot")
    whole, rest = memory.trajectories.measure(trajectory.id), memory.trajectories.measure(trajectory.id, since=2)
    assert astuple(whole) == (4, 2, 6, 4) and astuple(rest) == (2, 1, 3, 2)
    assert measure(memory.trajectories.steps(trajectory.id)) == whole
    assert astuple(memory.trajectories.count_model_calls(trajectory.id)) == (2, 2)
    light = memory.trajectories.steps(trajectory.id, since=2, with_token_ids=False)
    assert [step.content for step in light] == ["", "you take carrot"]


async def test_text_that_no_disk_can_hold_is_mended(memory: Memory):
    trajectory = await open_trajectory(memory, opening=[{"role": "user", "content": "bad \ud800 half"}])
    step = Step(
        trajectory_id=trajectory.id,
        position=0,
        kind=StepKind.MODEL,
        content="half a pair \udfff, a whole 😀, nothing \x00",
        tool_calls=[command_call("\ud83d")],
    )
    await memory.trajectories.append(step, trajectory=trajectory)
    assert memory.trajectories.steps(trajectory.id)[0].content == "half a pair \ufffd, a whole 😀, nothing \ufffd"
    assert memory.trajectories.get(trajectory.id).opening[0]["content"] == "bad \ufffd half"


async def test_an_id_is_taken_once(memory: Memory):
    trajectory = await open_trajectory(memory)
    with pytest.raises(ValueError, match=f"{trajectory.id}.*exists"):
        await open_trajectory(memory, id=trajectory.id)
    with pytest.raises(ValueError, match="opens as 'running'"):
        await open_trajectory(memory, stage=TrajectoryStage.FINISHED)
