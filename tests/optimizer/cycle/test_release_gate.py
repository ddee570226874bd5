"""The release gate as a stage: the tasks it plays, its ledger entries, and the candidate's next stage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from memory.schema import (
    CycleStage,
    Feedback,
    PolicyStage,
    RewardSource,
    Split,
    Step,
    StepKind,
    Task,
    Trajectory,
    TrajectoryStage,
    new_id,
)
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.cycle.artifacts import DecidedVerdict, to_json
from optimizer.cycle.context import CycleContext
from optimizer.cycle.cycle import open_cycle
from optimizer.cycle.practice import learn_insights
from optimizer.cycle.release_gate import decide, decide_again, evaluate
from optimizer.errors import OptimizerError
from optimizer.evaluation.decision import alpha_of
from optimizer.seams import Seams, Serving
from tests.memory.episodes import PATIENT, HashingEncoder

CONFIG = OptimizerConfig.model_validate(
    {"environment": "kitchen", "evaluation": {"num_tasks": 40, "num_sealed_tasks": 20, "floor": 0.0}}
)
MEMORY_TOKENS = 100


class World:
    """Tasks by number; the test decides which policy wins which. Sealed tasks have separate names."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.wins: Callable[[Task, int, bool], bool] = lambda task, policy, use_memory: False
        self.serving = Serving()
        self.played: list[tuple[str, str, int, bool, float]] = []

    @property
    def seams(self) -> Seams:
        return Seams(
            rollout=self.rollout,
            tasks=self.tasks,
            sealed_tasks=self.sealed_tasks,
            serving=lambda environment: self.serving,
        )

    def tasks(self, environment: str, split: Split, num_tasks: int, offset: int = 0) -> list[Task]:
        assert environment in ("kitchen", "pantry"), environment
        return [Task(environment, str(n), "cooking", split) for n in range(offset, offset + num_tasks)]

    def sealed_tasks(self, environment: str, num_tasks: int) -> list[Task]:
        return [Task(environment, f"sealed-{n}", "cooking", Split.HELD_OUT) for n in range(num_tasks)]

    async def rollout(self, task: Task, *, policy: int, use_memory: bool, temperature: float, seed: int) -> Trajectory:
        self.played.append((task.environment, task.name, policy, use_memory, temperature))
        tokens = 200 + MEMORY_TOKENS * use_memory
        is_won = self.wins(task, policy, use_memory)
        return await live_through(self.memory, task, policy=policy, reward=float(is_won), tokens=tokens)

    def names_of(self, policy: int, *, environment: str = "kitchen") -> list[str]:
        return [name for where, name, who, *_ in self.played if (where, who) == (environment, policy)]


async def live_through(
    memory: Memory, task: Task | None, *, policy: int = 0, reward: float = 1.0, tokens: int = 200
) -> Trajectory:
    """Record an episode with one model call."""
    trajectory = Trajectory(
        id=new_id("trj"),
        episode_id=new_id("eps"),
        environment=task.environment if task else None,
        task=task.name if task else None,
        task_text="" if task else "How do I cook an egg?",
        kind="cooking",
        split=task.split if task else Split.LIVE,
        policy=policy,
    )
    await memory.trajectories.open(trajectory)
    said = Step(
        trajectory_id=trajectory.id,
        position=0,
        kind=StepKind.MODEL,
        content="Done.",
        prompt_token_ids=[1] * tokens,
        output_token_ids=[2] * 10,
    )
    await memory.trajectories.append(said, trajectory=trajectory)
    await memory.trajectories.reward(trajectory.id, reward, RewardSource.ENVIRONMENT)
    return await memory.trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED)


@pytest.fixture
async def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        await memory.policies.register_base("base")
        yield memory


@pytest.fixture
def world(memory: Memory) -> World:
    return World(memory)


async def reach_the_gate(world: World, config: OptimizerConfig = CONFIG) -> CycleContext:
    """Return a cycle that has just made its candidate, without running the stages before."""
    memory = world.memory
    cycle = await memory.cycles.open(config.model_dump(mode="json"))
    candidate = await memory.policies.draft(parent=0, cycle_id=cycle.id)
    await memory.policies.move(candidate.version, PolicyStage.CANDIDATE)
    demonstrations = {"num_rows": 1, "num_tasks": 1, "num_with_memory": 0, "tally": {}, "trajectory_ids": []}
    await memory.cycles.save(
        cycle.id,
        artifacts={
            "sft": {
                "policy": candidate.version,
                "metrics": {"num_steps": 1, "seconds": 1.0},
                "settings": {"lora_rank": 8, "learning_rate": 1e-3, "epochs": 1, "batch_size": 8},
            },
            "candidate": candidate.version,
            "demonstrations": demonstrations,
        },
    )
    return CycleContext(memory, world.seams, cycle.id)


async def pass_the_gate(world: World, config: OptimizerConfig = CONFIG) -> tuple[CycleContext, DecidedVerdict]:
    context = await reach_the_gate(world, config)
    await evaluate(context)
    await decide(context)
    verdict = context.artifacts.verdict
    assert verdict is not None
    await world.memory.cycles.save(context.cycle_id, stage=CycleStage.COMPLETED, verdict=to_json(verdict))
    return context, verdict


def page_of(context: CycleContext) -> str:
    return (context.reports / "report.md").read_text()


def candidate_always(task: Task, policy: int, use_memory: bool) -> bool:
    return policy > 0


async def test_a_promoted_policy_plays_the_sealed_block_once_and_its_report_says_how_often_that_happened(world):
    world.wins = lambda task, policy, use_memory: policy > 0 and not task.name.endswith("7")
    context, verdict = await pass_the_gate(world)

    assert verdict.decision == "promote"
    sealed = [name for name in world.names_of(1) if name.startswith("sealed")]
    assert sorted(sealed) == sorted(f"sealed-{n}" for n in range(20))
    assert not [name for name in world.names_of(0) if name.startswith("sealed")]
    assert "Sealed block, played after the decision: 90.0% of 20 tasks" in page_of(context)
    assert "It was touched 1 time, this one included" in page_of(context)

    world.wins = lambda task, policy, use_memory: policy > 1
    context, _ = await pass_the_gate(world)
    assert "It was touched 2 times, this one included" in page_of(context)


async def test_every_comparison_plays_held_out_tasks_of_its_own_and_the_sealed_ones_only_at_a_release(world):
    world.wins = lambda task, policy, use_memory: int(task.name) % 2 == 0
    for number in range(3):
        world.played.clear()
        context, verdict = await pass_the_gate(world)

        block = {str(n) for n in range(40 * number, 40 * number + 40)}
        assert set(world.names_of(0)) == set(world.names_of(verdict.policy)) == block
        assert context.artifacts.held_out_offset == 40 * number


async def test_each_look_at_an_incumbent_spends_and_the_report_says_how_much(world):
    world.wins = lambda task, policy, use_memory: int(task.name) % 2 == 0
    for look in (1, 2):
        context, verdict = await pass_the_gate(world)
        assert (verdict.decision, verdict.look) == ("uninformative", look)
        assert world.memory.policies.get(verdict.policy).stage is PolicyStage.CANDIDATE

    spent = alpha_of(1, 0.05) + alpha_of(2, 0.05)
    assert world.memory.verdicts.alpha_spent(0) == pytest.approx(spent)
    assert f"{spent:.4f} of 0.0500 of the incumbent's error budget is spent" in page_of(context)
    assert "Look 2 at this incumbent" in page_of(context)


async def test_a_promoted_incumbent_has_a_budget_of_its_own(world):
    world.wins = candidate_always
    await pass_the_gate(world)
    world.wins = lambda task, policy, use_memory: policy > 1
    _, verdict = await pass_the_gate(world)

    assert (verdict.decision, verdict.look, verdict.incumbent["policy"]) == ("promote", 1, 1)


async def test_a_gate_that_dies_after_the_verdict_spends_nothing_twice(world):
    world.wins = lambda task, policy, use_memory: int(task.name) % 2 == 0
    context = await reach_the_gate(world)
    for _ in range(2):
        await evaluate(context)
        await decide(context)

    assert len(world.played) == 4 * 40
    assert world.memory.verdicts.alpha_spent(0) == pytest.approx(alpha_of(1, 0.05))


async def test_an_undecided_candidate_is_judged_again_on_new_tasks_and_that_spends_too(world):
    world.wins = lambda task, policy, use_memory: int(task.name) % 2 == 0
    context, undecided = await pass_the_gate(world)
    assert undecided.decision == "uninformative" and "`judge v1`" in undecided.reason
    world.played.clear()
    world.wins = candidate_always

    verdict = await decide_again(context)

    assert (verdict.decision, verdict.look) == ("promote", 2)
    assert {name for name in world.names_of(0)} == {str(n) for n in range(40, 80)}
    assert world.memory.policies.active().version == 1
    assert (context.reports / "report-1.md").exists() and "promote" in page_of(context)


async def test_a_candidate_of_a_method_that_another_version_had_is_not_judged_and_nothing_is_played(world):
    world.wins = lambda task, policy, use_memory: int(task.name) % 2 == 0
    context, _ = await pass_the_gate(world)
    world.played.clear()
    context.artifacts = context.artifacts.model_copy(update={"methods": ["ppo"]})

    with pytest.raises(OptimizerError, match="'ppo'"):
        await decide_again(context)

    assert not world.played and len(world.memory.verdicts.select()) == 1


async def test_tasks_that_have_decided_do_not_decide_again_where_the_list_of_tasks_begins_anew(world):
    world.tasks = lambda environment, split, num_tasks, offset=0: [
        Task(environment, str(n), "cooking", split) for n in range(50)[: offset + num_tasks]
    ]
    world.wins = lambda task, policy, use_memory: int(task.name) % 2 == 0
    context, _ = await pass_the_gate(world)
    world.played.clear()
    world.wins = candidate_always

    verdict = await decide_again(context)

    assert set(world.names_of(0)) == {str(n) for n in range(40, 50)}
    assert verdict.decision == "uninformative" and "10 tasks were played by both, 30 are needed" in verdict.reason


async def test_a_rejected_candidate_may_be_judged_again_and_becomes_a_candidate_or_better(world):
    world.wins = lambda task, policy, use_memory: policy == 0
    context, rejected = await pass_the_gate(world)
    assert rejected.decision == "reject"
    assert world.memory.policies.get(1).stage is PolicyStage.REJECTED
    world.wins = lambda task, policy, use_memory: int(task.name) % 2 == 0

    assert (await decide_again(context)).decision == "uninformative"
    assert world.memory.policies.get(1).stage is PolicyStage.CANDIDATE


async def test_a_candidate_cannot_be_judged_until_it_wins(world):
    world.wins = lambda task, policy, use_memory: random.Random(f"{task.name}/{policy}").random() < 0.5
    context, _ = await pass_the_gate(world)
    for _ in range(6):
        await decide_again(context)

    assert world.memory.verdicts.alpha_spent(0) < 0.05
    looks = [entry.look for entry in world.memory.verdicts.select() if entry.look is not None]
    assert sorted(looks) == list(range(1, len(looks) + 1)) and len(looks) == 7


async def test_a_comparison_that_could_not_be_tested_spends_nothing(world):
    few = CONFIG.model_copy(update={"evaluation": CONFIG.evaluation.model_copy(update={"num_tasks": 20})})
    world.wins = candidate_always

    _, verdict = await pass_the_gate(world, few)

    assert verdict.decision == "uninformative" and not verdict.was_tested
    assert world.memory.verdicts.alpha_spent(0) == 0


async def test_where_replies_are_sampled_the_contestants_try_each_task_four_times_as_warm_as_they_serve(world):
    world.serving = Serving(temperature=0.7, use_memory=True)
    world.wins = lambda task, policy, use_memory: policy > 0 and int(task.name.removeprefix("sealed-")) % 2 == 0
    config = CONFIG.model_copy(update={"evaluation": CONFIG.evaluation.model_copy(update={"num_tasks": 80})})
    context, verdict = await pass_the_gate(world, config)

    on = [play for play in world.played if play[3] and not play[1].startswith("sealed")]
    off = [play for play in world.played if not play[3]]
    assert len(on) == 2 * 4 * 40 and len(off) == 2 * 40
    assert {play[4] for play in world.played} == {0.7}
    assert verdict.decision == "promote" and verdict.paired["num_tasks"] == 40
    assert "each played 4 times, at temperature 0.7" in page_of(context) and "(pass@4)" in page_of(context)


@pytest.mark.parametrize("use_memory", [True, False])
async def test_the_verdict_compares_both_as_they_serve(world, use_memory):
    world.serving = Serving(use_memory=use_memory)
    settings = CONFIG.evaluation.model_copy(update={"serve_with_memory": use_memory})
    world.wins = candidate_always

    _, verdict = await pass_the_gate(world, CONFIG.model_copy(update={"evaluation": settings}))

    assert verdict.candidate["use_memory"] is verdict.incumbent["use_memory"] is use_memory
    assert world.memory.policies.active().use_memory is None
    # memory that is never served is not played either
    assert {play[3] for play in world.played} == ({True, False} if use_memory else {False})


async def test_what_is_no_worse_and_cheaper_without_memory_is_promoted_and_then_served_without(world):
    settings = CONFIG.evaluation.model_copy(update={"noninferiority_margin": 0.1, "num_tasks": 100})
    config = CONFIG.model_copy(update={"evaluation": settings})
    world.wins = lambda task, policy, use_memory: int(task.name.removeprefix("sealed-")) % 2 == 0

    context, verdict = await pass_the_gate(world, config)

    assert (verdict.decision, verdict.basis) == ("promote", "no worse and cheaper")
    assert world.memory.policies.active().use_memory is False
    assert {play[3] for play in world.played if play[1].startswith("sealed")} == {False}
    assert "no worse and cheaper" in page_of(context)

    world.wins = lambda task, policy, use_memory: policy > 1
    _, verdict = await pass_the_gate(world, config)
    assert verdict.incumbent == {"name": "incumbent-off", "policy": 1, "use_memory": False}


LEARNS_FROM_BOTH = CONFIG.model_copy(update={"learn_from": ["pantry"]})


@pytest.mark.parametrize(("loses", "decision"), [(0, "promote"), (30, "reject")])
async def test_every_other_environment_that_was_learned_from_has_a_say(world, loses, decision):
    def wins(task: Task, policy: int, use_memory: bool) -> bool:
        if task.environment == "pantry":
            return policy == 0 or int(task.name) >= loses
        return policy > 0

    world.wins = wins
    context, verdict = await pass_the_gate(world, LEARNS_FROM_BOTH)

    assert verdict.decision == decision
    assert len(world.names_of(0, environment="pantry")) == len(world.names_of(1, environment="pantry")) == 40
    assert "Learned from pantry too" in page_of(context)
    assert ("'pantry'" in verdict.reason) == (decision == "reject")


async def test_weights_of_an_environment_s_cycle_learn_from_its_own_episodes_alone(world):
    memory = world.memory
    ours = await live_through(memory, Task("kitchen", "p1", "cooking", Split.PRACTICE))
    theirs = await live_through(memory, Task("pantry", "p1", "cooking", Split.PRACTICE))
    clients = await live_through(memory, None)
    for each in (ours, theirs, clients):
        await memory.feedback.post(Feedback(trajectory_id=each.id, correction="Gently."))

    async def learned_from(config: OptimizerConfig) -> list[set[str]]:
        cycle = await memory.cycles.open(config.model_dump(mode="json"))
        context = CycleContext(memory, world.seams, cycle.id)
        found = [
            await context.read_pool(),
            await context.read_corrections(),
            await context.read_pool(any_environment=True),
        ]
        await learn_insights(context)
        await memory.cycles.save(cycle.id, stage=CycleStage.ERROR, error="enough")
        return [{each.trajectory.id for each in pool} for pool in found]

    logged = OptimizerConfig(environment="", practice_episodes=0, explore_episodes=0)
    everything = {ours.id, theirs.id, clients.id}
    assert await learned_from(CONFIG) == [{ours.id}, {ours.id}, everything]
    assert await learned_from(LEARNS_FROM_BOTH) == [{ours.id, theirs.id}, {ours.id, theirs.id}, everything]
    assert await learned_from(logged) == [{clients.id}, {clients.id}, everything]


async def test_a_cycle_says_at_its_start_whose_episodes_it_leaves_to_another(world):
    await live_through(world.memory, None)

    cycle = await open_cycle(world.memory, CONFIG)

    assert cycle.artifacts["pool"].startswith(
        "weights learn from 'kitchen' only; rewarded episodes left out: 1 of live"
    )
    assert "`learn --logged`" in cycle.artifacts["pool"]


def test_live_traffic_cannot_be_proved_by_an_environment():
    for named in ("live", "", "kitchen"):
        with pytest.raises(ValidationError, match="learn --logged"):
            OptimizerConfig(environment="kitchen", learn_from=[named])


async def test_the_last_held_out_task_is_followed_by_the_first(world):
    world.tasks = lambda environment, split, num_tasks, offset=0: [
        Task(environment, str(n), "cooking", split) for n in range(50)[offset : offset + num_tasks]
    ]
    context = await reach_the_gate(world)

    assert [task.name for task in context.take_held_out("kitchen", 40)] == [str(n % 50) for n in range(40, 80)]


async def test_the_report_is_plain_json(world):
    world.wins = candidate_always
    context, _ = await pass_the_gate(world)

    report = json.loads((context.reports / "report.json").read_text(), parse_constant=pytest.fail)

    assert report["gate"]["sealed_touches"] == 1 and report["verdict"]["basis"] == "better"
