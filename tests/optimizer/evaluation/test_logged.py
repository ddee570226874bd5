from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from memory.schema import (
    Feedback,
    Policy,
    PolicyStage,
    Reward,
    RewardSource,
    Split,
    Step,
    StepKind,
    StoredVerdict,
    Trajectory,
    TrajectoryStage,
    new_id,
)
from memory.store import Memory
from optimizer.config import EvaluationConfig, OptimizerConfig
from optimizer.cycle.context import CycleContext
from optimizer.cycle.release_gate import decide_again
from optimizer.evaluation.decision import Decision, alpha_of
from optimizer.evaluation.decision import decide as decide_by_cells
from optimizer.evaluation.intervals import compare_paired
from optimizer.evaluation.logged import read_logged_cells
from optimizer.seams import Seams
from tests.memory.episodes import PATIENT, HashingEncoder

NUM_TASKS = 40
PLAYS_NOTHING = OptimizerConfig(environment="", practice_episodes=0, explore_episodes=0)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        yield memory


@pytest.fixture
async def candidate(memory: Memory) -> Policy:
    await memory.policies.register_base("base")
    return await memory.policies.draft(parent=0)


async def log(
    memory: Memory,
    policy: int,
    task: int,
    reward: float | None,
    *,
    split: Split = Split.HELD_OUT,
    temperature: float = 0.0,
    tenant: str = "",
    environment: str | None = None,
    kinds: Sequence[StepKind] = (),
) -> str:
    """Record an episode of a client."""
    trajectory = await memory.trajectories.open(
        Trajectory(
            id=new_id("trj"),
            episode_id=new_id("eps"),
            tenant=tenant,
            environment=environment,
            task=str(task),
            split=split,
            policy=policy,
            temperature=temperature,
        )
    )
    for position, kind in enumerate(kinds):
        step = Step(trajectory_id=trajectory.id, position=position, kind=kind)
        await memory.trajectories.append(step, trajectory=trajectory)
    if reward is not None:
        await memory.trajectories.reward(trajectory.id, reward, RewardSource.USER)
    await memory.trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED)
    return trajectory.id


def decide(memory: Memory, candidate: Policy):
    cells = read_logged_cells(memory, candidate, memory.policies.get(0))
    return decide_by_cells(*cells, EvaluationConfig(min_tasks=NUM_TASKS), is_open_ended=True)


async def log_both(memory: Memory, candidate: Policy, num_tasks: int = NUM_TASKS, **how) -> None:
    """Log wins of the base in every fourth task, and of the candidate in all but every eighth."""
    for task in range(num_tasks):
        await log(memory, 0, task, float(task % 4 == 0), **how)
        await log(memory, candidate.version, task, float(task % 8 != 7), **how)


async def test_logged_tries_at_the_same_tasks_pass_the_gate_as_played_ones_do(memory, candidate):
    await log_both(memory, candidate)

    verdict = decide(memory, candidate)

    assert verdict.decision is Decision.PROMOTE
    assert (verdict.paired.num_won, verdict.paired.num_lost) == (25, 0)
    assert (verdict.candidate.name, verdict.incumbent.name) == ("candidate-off", "incumbent-off")


@pytest.mark.parametrize(("num_won", "expected"), [(28, Decision.UNINFORMATIVE), (32, Decision.PROMOTE)])
async def test_who_asks_for_a_verdict_may_have_waited_until_it_looked_good(memory, num_won: int, expected: Decision):
    """28 tasks won and 12 lost would do for the exact test of a number of tasks that was fixed before."""
    await memory.policies.register_base("base")
    cycle = await memory.cycles.open(PLAYS_NOTHING.model_dump())
    made = await memory.policies.draft(parent=0, cycle_id=cycle.id)
    await memory.policies.move(made.version, PolicyStage.CANDIDATE)
    await memory.cycles.save(cycle.id, artifacts={"candidate": made.version})
    for task in range(40):
        is_won = task < num_won
        await log(memory, 0, task, float(not is_won))
        await log(memory, made.version, task, float(is_won))

    decided = await decide_again(CycleContext(memory, Seams(rollout=None, tasks=None), cycle.id))

    assert decided.decision is expected and decided.was_tested
    exact = compare_paired([1.0] * num_won + [0.0] * (40 - num_won), [0.0] * num_won + [1.0] * (40 - num_won))
    assert exact.p_better < alpha_of(1, 0.05) and decided.paired["p_better"] > exact.p_better
    assert (decided.paired["low"] > 0) is (expected is Decision.PROMOTE)


async def test_of_several_tries_at_a_task_the_first_counts_however_many_follow(memory, candidate, monkeypatch):
    monkeypatch.setattr("optimizer.evaluation.logged.PAGE", 7)
    first = await log(memory, candidate.version, 7, 0.0)
    await log_both(memory, candidate)
    for _ in range(20):
        await log(memory, candidate.version, 7, 1.0)

    ours, _ = read_logged_cells(memory, candidate, memory.policies.get(0))

    (tried,) = [played for played in ours.played if played.task == "7"]
    assert (tried.trajectory_id, tried.is_success) == (first, False)
    assert len(ours.played) == NUM_TASKS


async def test_a_first_try_that_was_never_rewarded_cannot_be_played_again_until_it_is_won(memory, candidate):
    await log_both(memory, candidate)
    other = NUM_TASKS
    await log(memory, 0, other, 0.0)
    await log(memory, candidate.version, other, None)
    await log(memory, candidate.version, other, 1.0)

    ours, _ = read_logged_cells(memory, candidate, memory.policies.get(0))

    (tried,) = [played for played in ours.played if played.task == str(other)]
    assert tried.is_broken and not tried.is_success


async def test_tasks_that_decided_on_a_candidate_before_do_not_decide_again(memory, candidate):
    await log_both(memory, candidate)
    entry = StoredVerdict(id="ver_1", candidate=candidate.version, incumbent=0)
    await memory.verdicts.open(entry, choose_alpha=lambda look: 0.01)
    await memory.verdicts.close("ver_1", "uninformative", was_tested=True, tasks=[str(n) for n in range(30)])

    ours, _ = read_logged_cells(memory, candidate, memory.policies.get(0))

    assert {played.task for played in ours.played} == {str(n) for n in range(30, NUM_TASKS)}


async def test_turns_are_counted_from_the_steps_as_they_were_recorded(memory, candidate):
    for version in (0, candidate.version):
        await log(memory, version, 1, 1.0, kinds=[StepKind.MODEL, StepKind.TOOL, StepKind.TOOL, StepKind.MODEL])

    ours, _ = read_logged_cells(memory, candidate, memory.policies.get(0))

    assert [played.num_calls for played in ours.played] == [2]


async def test_what_this_server_plays_itself_is_no_try_of_a_client(memory, candidate):
    await log_both(memory, candidate)
    for task in range(64):  # `play --split held-out` with the active policy alone
        await log(memory, 0, task, 0.0, environment="textworld")

    verdict = decide(memory, candidate)

    assert verdict.decision is Decision.PROMOTE and verdict.paired.num_tasks == NUM_TASKS


@pytest.mark.parametrize("how", [{"split": Split.LIVE}, {"tenant": "shop"}, {"environment": "kitchen"}])
async def test_what_is_not_held_out_or_another_tenant_s_decides_nothing(memory, candidate, how):
    await log_both(memory, candidate, **how)

    verdict = decide(memory, candidate)

    assert verdict.decision is Decision.UNINFORMATIVE and verdict.paired.num_tasks == 0


async def test_what_was_played_before_the_candidate_was_there_is_not_compared_with_it(memory, candidate):
    await log_both(memory, candidate)
    later = await memory.policies.draft(parent=0)
    for task in range(NUM_TASKS):
        await log(memory, later.version, task, 1.0)

    assert decide(memory, later).paired.num_tasks == 0


async def test_tries_at_different_temperatures_are_not_compared(memory, candidate):
    await log(memory, candidate.version, 0, 1.0, temperature=1.0)
    await log_both(memory, candidate)

    verdict = decide(memory, candidate)

    assert verdict.decision is Decision.UNINFORMATIVE and verdict.paired.num_tasks == NUM_TASKS - 1


@pytest.mark.parametrize("of_candidate", [True, False])
async def test_pairs_that_were_chosen_after_an_outcome_was_known_decide_nothing(memory, candidate, of_candidate):
    await log_both(memory, candidate)
    assert decide(memory, candidate).decision is Decision.PROMOTE
    for task in range(
        NUM_TASKS, NUM_TASKS + 3
    ):  # what the candidate lost, or the incumbent won, is left without a pair
        version, reward = (candidate.version, 0.0) if of_candidate else (0, 1.0)
        await log(memory, version, task, reward)

    verdict = decide(memory, candidate)

    assert verdict.decision is Decision.UNINFORMATIVE and not verdict.was_tested
    assert verdict.reason.startswith(f"3 of {NUM_TASKS + 3} held-out tasks were tried by one policy alone")


async def test_tries_that_nobody_rewarded_are_a_doubt(memory, candidate):
    for task in range(7, NUM_TASKS, 8):  # those that the candidate lost
        await log(memory, candidate.version, task, None)
    await log_both(memory, candidate)

    verdict = decide(memory, candidate)

    assert verdict.decision is Decision.UNINFORMATIVE and "no reward" in verdict.reason


async def test_a_task_that_measures_teaches_nothing_however_else_it_is_asked(memory, candidate):
    await log(memory, 0, 1, 1.0)
    await log(memory, 0, 1, 1.0, split=Split.LIVE)
    taught = [
        await log(memory, 0, 1, 1.0, split=Split.LIVE, tenant="shop"),
        await log(memory, 0, 2, 1.0, split=Split.LIVE),
    ]
    cycle = await memory.cycles.open(PLAYS_NOTHING.model_dump())

    pool = await CycleContext(memory, Seams(rollout=None, tasks=None), cycle.id).read_pool(is_for_weights=False)

    assert sorted(each.trajectory.id for each in pool) == sorted(taught)


def test_without_an_environment_nothing_can_be_played():
    with pytest.raises(ValidationError, match="nothing can be played without an environment"):
        OptimizerConfig(environment="")


async def test_feedback_of_a_key_that_does_not_teach_decides_nothing(memory, candidate):
    key, _ = await memory.keys.create("page", ["feedback"])
    for task in range(NUM_TASKS):
        await log(memory, 0, task, 0.0)
        trajectory_id = await log(memory, 1, task, 0.0)
        await memory.feedback.post(Feedback(trajectory_id=trajectory_id, value=True, key_id=key.id))
        assert memory.trajectories.effective_reward(trajectory_id) == 1.0
        assert memory.trajectories.reward_for_weights(trajectory_id) == 0.0

    ours, theirs = read_logged_cells(memory, candidate, memory.policies.get(0))

    assert len(ours.played) == NUM_TASKS and ours.success == theirs.success == 0.0


async def test_a_verifiers_grades_decide_nothing_even_where_a_row_came_in_by_another_way(memory, candidate):
    graded = []
    for task in range(NUM_TASKS):
        graded.append(await log(memory, candidate.version, task, None))
        await log(memory, 0, task, None)
    rows = [Reward(id=new_id("rew"), trajectory_id=it, value=1.0, source=RewardSource.VERIFIER) for it in graded]
    await memory.database.write(lambda session: session.add_all(rows))

    ours, theirs = read_logged_cells(memory, candidate, memory.policies.get(0))

    assert len(memory.trajectories.rewards(graded[0])) == 1
    assert [cell.num_successes for cell in (ours, theirs)] == [0, 0]
    assert decide(memory, candidate).decision is Decision.UNINFORMATIVE
