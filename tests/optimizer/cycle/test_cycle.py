from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import shutil
from collections import Counter
from dataclasses import replace

import numpy
import pytest
from safetensors.numpy import save_file

from memory.adapters import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, Manifest, write_adapter_atomically, write_manifest
from memory.datasets.examples import Origin
from memory.errors import UnknownCycle
from memory.formats.content import ExampleContent, ExampleKind
from memory.schema import CycleStage, Feedback, PolicyStage, RewardSource, Split, Task, TrajectoryStage
from memory.store import Memory
from optimizer.config import DemonstrationConfig, EvaluationConfig, OptimizerConfig
from optimizer.cycle.context import CycleContext
from optimizer.cycle.cycle import abandon_cycle, open_cycle, run_cycle
from optimizer.cycle.methods import METHODS
from optimizer.cycle.readiness import measure_needs
from optimizer.cycle.stages import build_rows
from optimizer.errors import CompletionError, TemplateMismatch, TooFewTrajectories, TrainingDoesNotFit, TrainingError
from optimizer.placement import Gpu, Hardware
from optimizer.seams import Seams
from optimizer.training.launch import read_finished
from optimizer.training.spec import TrainingSpec
from tests.memory.episodes import HashingEncoder, play
from tests.optimizer.worlds import ACT, call, live

FOODS = ["carrot", "onion", "banana", "pork", "pepper", "salmon"]
SKILL = {0: 0.35, 1: 0.6, 2: 0.95}  # probability that each policy takes the stove
SKILL_FROM_MEMORY = 0.25


class Died(BaseException):
    """Simulates the death of the process: no code may catch it."""


class Kitchen:
    """Tasks in which frying needs the stove; success depends on the policy and on memory."""

    def __init__(self, memory, tokenizer, skill=SKILL) -> None:
        self.memory, self.tokenizer, self.skill = memory, tokenizer, skill
        self.num_played = 0
        self.dies_after: int | None = None

    def tasks(self, environment, split, num_tasks, offset=0):
        return [
            Task(environment, f"{split.value}-{number}", "cooking", split)
            for number in range(offset, offset + num_tasks)
        ]

    def holds_out(self, environment, task, texts):
        return (task or "").startswith("held-out-")

    async def rollout(self, task, *, policy, use_memory, temperature, seed, keeps_logprobs=False):
        if self.num_played == self.dies_after:
            raise Died
        self.num_played += 1
        insights = self.memory.insights.active("kitchen") if use_memory else []
        dice = random.Random(f"{task.name}/{seed if temperature else policy}/{temperature}")
        is_right = dice.random() < self.skill[policy] + (SKILL_FROM_MEMORY if insights else 0.0)
        graded = self._script(task, is_right, insights)
        graded.trajectory.policy = policy
        graded.trajectory.stage = TrajectoryStage.RUNNING
        await self.memory.trajectories.open(graded.trajectory)
        for step in graded.steps:
            if keeps_logprobs and step.output_token_ids:
                step.output_logprobs = [-0.5] * len(step.output_token_ids)
            await self.memory.trajectories.append(step, trajectory=graded.trajectory)
        await self.memory.trajectories.reward(graded.trajectory.id, float(is_right), RewardSource.ENVIRONMENT)
        return await self.memory.trajectories.close(graded.trajectory.id, stage=TrajectoryStage.FINISHED)

    def _script(self, task, is_right, insights):
        food = FOODS[int(hashlib.sha256(task.name.encode()).hexdigest(), 16) % len(FOODS)]
        moves = [("read cookbook", f"Directions:\nfry the {food}\nprepare meal")]
        if is_right:
            moves += [(f"cook {food} with stove", "It sizzles."), ("prepare meal", "You win!")]
        else:
            moves += [(f"cook {food} with oven", "It burns. You lose!")]
        memory_text = "<memory>\n" + "\n".join(insight.text for insight in insights) + "\n</memory>" if insights else ""
        tokenizer = self.tokenizer
        if task.split is Split.HELD_OUT:  # not learned from, so they may be short
            moves, tokenizer = moves[:1], None
        return live(
            moves, tokenizer=tokenizer, task=task.name, split=task.split, memory_text=memory_text, is_success=is_right
        )


class FakeTrainer:
    """Writes a tiny adapter at once, or fails if `fails` is set."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.fails = False

    async def __call__(self, spec, *, on_step=None, num_attempts=2):
        if (made := read_finished(spec)) is not None:
            return made
        if self.fails:
            raise TrainingError("the trainer was killed; its log ends: out of memory")
        self.trained.append(spec.kind)
        if on_step is not None:
            await on_step({"step": 1, "total": 1, "loss": 0.5})
        for early in spec.early_adapters:
            self._write(spec.at(early))
        self._write(spec)
        return read_finished(spec)

    def _write(self, spec) -> None:
        unfinished = spec.work_dir / "adapter"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file({"lora_B": numpy.ones((2, 2), dtype=numpy.float32)}, unfinished / WEIGHTS_NAME)
        (unfinished / CONFIG_NAME).write_text("{}")
        manifest = Manifest(
            name=spec.name,
            version=spec.version,
            kind=spec.kind,
            base_model=spec.base_model,
            base_digest="",
            trajectory_ids=spec.trajectory_ids,
            parent=spec.parent,
            settings={**spec.settings(), "spec_digest": spec.digest()},
            metrics={"num_steps": 1, "seconds": 0.1, "loss/first": 0.7, "loss/last": 0.5},
        )
        write_manifest(unfinished, manifest)
        write_adapter_atomically(unfinished, spec.output_dir)


CONFIG = OptimizerConfig.model_validate(
    {
        "environment": "kitchen",
        "num_practice_tasks": 12,
        "practice_episodes": 36,
        "explore_episodes": 36,
        "num_selection_tasks": 0,
        "concurrency": 16,
        "demonstrations": {"min_rows": 4},
        "preferences": {"min_rows": 4},
        "evaluation": {"num_tasks": 40, "min_tasks": 30},
    }
)


@pytest.fixture
async def memory(tmp_path, tiny_base):
    opened = Memory.open(tmp_path / "data", encoder=HashingEncoder())
    await opened.policies.register_base(str(tiny_base))
    yield opened
    opened.close()


@pytest.fixture
def kitchen(memory, tokenizer):
    return Kitchen(memory, tokenizer)


@pytest.fixture
def trainer():
    return FakeTrainer()


def seams_of(kitchen, trainer) -> Seams:
    return Seams(rollout=kitchen.rollout, tasks=kitchen.tasks, holds_out=kitchen.holds_out, train=trainer)


async def test_one_turn_of_the_loop_ends_with_a_better_policy_and_a_report(memory, kitchen, trainer):
    cycle = await open_cycle(memory, CONFIG)

    verdict = await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    assert verdict.decision == "promote" and memory.policies.active().version == 2
    assert trainer.trained == ["sft", "dpo"]
    assert [policy.version for policy in memory.policies.lineage(2)] == [2, 1, 0]
    assert memory.policies.get(1).stage is PolicyStage.DRAFT
    closed = memory.cycles.get(cycle.id)
    assert closed.stage == CycleStage.COMPLETED and closed.verdict["policy"] == 2
    learned_from = closed.artifacts["demonstrations"]["trajectory_ids"]
    assert learned_from and all(memory.trajectories.get(id_).split is Split.PRACTICE for id_ in learned_from)
    assert [insight.text for insight in memory.insights.active("kitchen")] == ["fry the _ -> cook _ with stove"]
    report = json.loads((memory.data_dir / "reports" / cycle.id / "report.json").read_text())
    assert set(report["cells"]) == {"base-off", "base-on", "sft-off", "sft-on", "dpo-off", "dpo-on"}
    compared = {(one["first"], one["second"]) for one in report["comparisons"]}
    assert {("dpo-off", "sft-off"), ("dpo-on", "sft-on")} <= compared  # DPO against SFT on the same episodes
    page = (memory.data_dir / "reports" / cycle.id / "report.md").read_text()
    assert report["demonstrations"]["trained_share"] == 1.0
    assert "100.0% of the agent's own tokens" in page
    (teacher,) = report["demonstrations"]["teachers"]
    assert teacher["teacher"] == "environment" and teacher["num_rows"] == report["demonstrations"]["num_rows"]
    assert "demonstrations taught by" in page and "preferences taught by" in page
    assert "promote" in page and "fry the _ -> cook _ with stove" in page and page.isascii()
    assert (memory.data_dir / "reports" / cycle.id / "success.png").stat().st_size > 5000


async def test_a_critic_that_fails_costs_its_insights_and_not_the_cycle(memory, kitchen, trainer):
    async def complete(messages, *, schema, max_tokens):
        raise CompletionError("the engine answered 500: out of memory")

    cycle = await open_cycle(memory, CONFIG)
    await run_cycle(memory, cycle.id, seams=replace(seams_of(kitchen, trainer), complete=complete))

    closed = memory.cycles.get(cycle.id)
    assert closed.stage == CycleStage.COMPLETED
    assert closed.artifacts["critiques"]["num_failed"] > 0 and memory.insights.active("kitchen") == []
    page = (memory.data_dir / "reports" / cycle.id / "report.md").read_text()
    assert "The first failure: CompletionError: the engine answered 500: out of memory" in page


@pytest.mark.parametrize("dies_after", [20, 50, 200], ids=["in practice", "in exploration", "in evaluation"])
async def test_a_process_that_dies_goes_on_at_the_stage_where_it_died(memory, kitchen, trainer, dies_after):
    cycle = await open_cycle(memory, CONFIG)
    kitchen.dies_after = dies_after
    with pytest.raises(BaseExceptionGroup):
        await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))
    assert memory.cycles.unfinished().id == cycle.id
    trained_before = list(trainer.trained)

    kitchen.dies_after = None
    verdict = await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    assert verdict.decision == "promote"
    assert trainer.trained == ["sft", "dpo"] and trained_before == trainer.trained[: len(trained_before)]
    assert len(memory.policies.select()) == 3
    one_turn = 36 + 36 + 6 * 40
    assert kitchen.num_played <= one_turn + 40  # at most one round or one cell is played again


@pytest.mark.parametrize("dies_after", [20, 50, 66], ids=["in practice", "in exploration", "in retries"])
async def test_an_interrupted_round_plays_what_is_missing_and_no_episode_twice(memory, kitchen, trainer, dies_after):
    seeds: dict[str, int] = {}

    async def rollout(task, *, seed, **how):
        played = await kitchen.rollout(task, seed=seed, **how)
        seeds[played.id] = seed
        return played

    seams = replace(seams_of(kitchen, trainer), rollout=rollout)
    cycle = await open_cycle(memory, CONFIG.model_copy(update={"concurrency": 2}))  # most episodes end before it dies
    kitchen.dies_after = dies_after
    with pytest.raises(BaseExceptionGroup):
        await run_cycle(memory, cycle.id, seams=seams)
    await memory.trajectories.close_orphans()
    kitchen.dies_after = None

    await run_cycle(memory, cycle.id, seams=seams)

    views = memory.trajectories.select(limit=1000, split=Split.PRACTICE, stage=TrajectoryStage.FINISHED)
    finished = [view.trajectory for view in views]
    assert Counter(it.policy for it in finished) == {0: 36, 1: 36}
    known = [(it.task, seeds[it.id]) for it in finished if it.id in seeds]
    assert len(known) > 60 and len(set(known)) == len(known)


async def test_a_trainer_that_fails_closes_the_cycle_with_its_reason(memory, kitchen, trainer):
    trainer.fails = True
    cycle = await open_cycle(memory, CONFIG)

    with pytest.raises(TrainingError):
        await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    closed = memory.cycles.get(cycle.id)
    assert closed.stage == CycleStage.ERROR and "out of memory" in closed.error
    assert memory.policies.active().version == 0 and memory.cycles.unfinished() is None


async def test_a_cancelled_cycle_can_be_abandoned_and_makes_room_for_another(memory, kitchen, trainer):
    cycle = await open_cycle(memory, CONFIG)
    running = asyncio.create_task(run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer)))
    await asyncio.sleep(0.2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert memory.cycles.unfinished().id == cycle.id

    closed = await abandon_cycle(memory, cycle.id, "cancelled by the operator")

    assert closed.stage == CycleStage.ERROR and closed.error == "cancelled by the operator"
    assert (await open_cycle(memory, CONFIG)).id != cycle.id


async def test_a_cycle_is_cancelled_before_its_first_checkpoint_in_a_fresh_directory(memory):
    cycle = await memory.cycles.open({})

    closed = await abandon_cycle(memory, cycle.id, "cancelled by the operator")

    assert closed.stage == CycleStage.ERROR and memory.cycles.unfinished() is None
    with pytest.raises(UnknownCycle):
        await abandon_cycle(memory, "cyc_none", "cancelled by the operator")


async def test_a_world_that_breaks_closes_the_cycle_with_its_own_words(memory, kitchen, trainer):
    async def broken(*arguments, **more):
        raise ConnectionError("the engine is gone")

    cycle = await open_cycle(memory, CONFIG)
    with pytest.raises(ExceptionGroup):
        await run_cycle(memory, cycle.id, seams=Seams(rollout=broken, tasks=kitchen.tasks, train=trainer))

    assert memory.cycles.get(cycle.id).error == "ConnectionError: the engine is gone"


async def test_a_planted_worse_candidate_is_rejected(memory, kitchen, trainer):
    kitchen.skill = {0: 0.6, 1: 0.5, 2: 0.05}
    cycle = await open_cycle(memory, CONFIG)

    verdict = await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    assert verdict.decision == "reject"
    assert memory.policies.get(2).stage is PolicyStage.REJECTED and memory.policies.active().version == 0


@pytest.mark.parametrize(
    ("skill", "chosen"), [({1: 0.3, 2: 0.3, 3: 0.95, 4: 0.3}, 3), ({1: 0.9, 2: 0.3, 3: 0.3, 4: 0.3}, 1)]
)
async def test_the_candidate_is_the_checkpoint_that_wins_practice_tasks_nothing_was_trained_on(
    memory, kitchen, trainer, skill, chosen
):
    kitchen.skill = {0: 0.35, **skill}  # SFT is v1; DPO after each of three epochs v2, v3 and v4
    cycle = await open_cycle(memory, CONFIG.model_copy(update={"num_selection_tasks": 30}))

    verdict = await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    artifacts = memory.cycles.get(cycle.id).artifacts
    assert verdict.policy == artifacts["candidate"] == chosen
    assert memory.policies.get(chosen).stage is PolicyStage.ACTIVE
    learned_from = {memory.trajectories.get(id_).task for id_ in artifacts["demonstrations"]["trajectory_ids"]}
    assert len(artifacts["selection_tasks"]) == 30 and not learned_from & set(artifacts["selection_tasks"])
    assert set(artifacts["selection"]["num_won"]) == {"1", "2", "3", "4"}
    assert trainer.trained == ["sft", "dpo"]
    page = (memory.data_dir / "reports" / cycle.id / "report.md").read_text()
    assert f"v{chosen} became the candidate" in page


async def test_without_enough_preferences_the_sft_policy_is_the_candidate(memory, kitchen, trainer):
    config = CONFIG.model_copy(update={"preferences": CONFIG.preferences.model_copy(update={"min_rows": 999})})
    kitchen.skill = {0: 0.35, 1: 0.95}
    cycle = await open_cycle(memory, config)

    verdict = await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    assert verdict.decision == "promote" and memory.policies.active().version == 1
    assert trainer.trained == ["sft"]
    assert "Too few preferences for DPO" in (memory.data_dir / "reports" / cycle.id / "report.md").read_text()


async def test_practice_without_a_win_ends_with_the_round_after_which_the_rest_cannot_be_enough(
    memory, kitchen, trainer
):
    kitchen.skill = {0: -1.0}
    cycle = await open_cycle(memory, CONFIG)

    with pytest.raises(TooFewTrajectories, match="v0 won none of 24 episodes of 'kitchen'") as caught:
        await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    assert caught.value.num_missing == 2
    assert kitchen.num_played == 24 and trainer.trained == []
    assert "2 are missing" in memory.cycles.get(cycle.id).error


async def test_too_few_demonstrations_say_how_many_are_missing(memory, kitchen, trainer):
    kitchen.skill = {0: -1.0}
    cycle = await open_cycle(memory, CONFIG.model_copy(update={"practice_episodes": 12}))

    with pytest.raises(TooFewTrajectories, match="4 are missing") as caught:
        await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    assert caught.value.num_missing == 4
    assert "not_a_success 12" in memory.cycles.get(cycle.id).error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"practice_episodes": 3}, "playing can add 3 at the most: 1 are missing"),
        ({"num_practice_tasks": 1}, "playing can add 2 at the most: 2 are missing"),
        ({"demonstrations": DemonstrationConfig(min_rows=25)}, "playing can add 24 at the most: 1 are missing"),
    ],
    ids=["few episodes", "few tasks", "many wanted"],
)
async def test_nothing_is_played_for_a_cycle_whose_practice_cannot_bring_enough(memory, kitchen, trainer, more, said):
    config = CONFIG.model_copy(update=more)

    with pytest.raises(TooFewTrajectories, match=said):
        await open_cycle(memory, config, seams=seams_of(kitchen, trainer))

    assert kitchen.num_played == 0 and memory.cycles.select() == []


async def test_what_was_won_before_counts_towards_what_a_cycle_needs(memory, kitchen, trainer):
    kitchen.skill = {0: 2.0}
    config = CONFIG.model_copy(update={"practice_episodes": 3})
    (task,) = kitchen.tasks("kitchen", Split.PRACTICE, 1, 99)
    for seed in range(3):
        won = await kitchen.rollout(task, policy=0, use_memory=False, temperature=1.0, seed=seed)

    (demonstrations, *_) = await measure_needs(memory, config)
    assert (demonstrations.needed, demonstrations.available, demonstrations.playable) == (4, 2, 3)  # 2 per task
    assert demonstrations.is_met and (await open_cycle(memory, config)).artifacts["needs"][0]["available"] == 2
    await memory.feedback.post(Feedback(trajectory_id=won.id, correction="The stove, please."))
    assert (await measure_needs(memory, config))[0].available == 3


async def test_many_corrections_of_one_task_count_as_far_as_rows_would_lack(memory, kitchen):
    kitchen.skill = {0: -1.0}
    (task,) = kitchen.tasks("kitchen", Split.PRACTICE, 1)
    for seed in range(20):
        lost = await kitchen.rollout(task, policy=0, use_memory=False, temperature=1.0, seed=seed)
        await memory.feedback.post(Feedback(trajectory_id=lost.id, correction="The stove, please."))

    logged = {"practice_episodes": 0, "demonstrations": DemonstrationConfig(min_rows=16)}
    (demonstrations, *_) = await measure_needs(memory, CONFIG.model_copy(update=logged))

    assert (demonstrations.available, demonstrations.is_met) == (16, True)


async def test_nothing_is_played_by_a_policy_that_never_won_so_far(memory, kitchen, trainer):
    kitchen.skill = {0: -1.0}
    for task in kitchen.tasks("kitchen", Split.PRACTICE, 60, 100):
        await kitchen.rollout(task, policy=0, use_memory=False, temperature=1.0, seed=1)

    with pytest.raises(TooFewTrajectories, match=r"v0 won none of 60 episodes of 'kitchen'.*play more"):
        await open_cycle(memory, CONFIG, seams=seams_of(kitchen, trainer))

    assert kitchen.num_played == 60


async def test_nothing_is_played_where_the_bases_files_are_not_there_to_train(tmp_path, kitchen, trainer):
    with Memory.open(tmp_path / "elsewhere", encoder=HashingEncoder()) as memory:
        await memory.policies.register_base("acme/not-downloaded")
        seams = seams_of(kitchen, trainer)

        room = (await measure_needs(memory, CONFIG, seams))[-1]
        with pytest.raises(TrainingDoesNotFit, match="'acme/not-downloaded'"):
            await open_cycle(memory, CONFIG, seams=seams)

        assert (room.name, room.is_met, room.is_required) == ("room to train", False, True)
        assert "'acme/not-downloaded'" in room.detail and kitchen.num_played == 0


async def test_what_a_cycle_needs_is_said_with_the_mend(memory, kitchen, trainer):
    few = CONFIG.model_copy(update={"explore_episodes": 0, "evaluation": EvaluationConfig(num_tasks=20)})
    needs = {need.name: need for need in await measure_needs(memory, few, seams_of(kitchen, trainer))}

    assert list(needs) == ["demonstrations", "preferences", "practice tasks", "held-out tasks", "room to train"]
    assert needs["demonstrations"].is_met and needs["room to train"].is_met
    pairs, held_out = needs["preferences"], needs["held-out tasks"]
    assert (pairs.needed, pairs.num_missing, pairs.is_required) == (4, 4, False) and "explore_episodes" in pairs.mend
    assert (held_out.needed, held_out.available, held_out.is_required) == (30, 20, False)
    assert "evaluation.num_tasks" in held_out.mend and kitchen.num_played == 0


@pytest.mark.parametrize("method", ["sft", "kto", "dpo"])
async def test_a_cycle_that_could_train_too_few_of_its_own_tokens_stops_and_names_the_template(
    memory, kitchen, trainer, tiny_base, method
):
    class Misrendered(Kitchen):
        def _script(self, task, is_right, insights):
            graded = super()._script(task, is_right, insights)
            graded.trajectory.memory_text = "<memory>\nNothing that any prompt holds.\n</memory>"
            return graded

    cycle = await open_cycle(memory, CONFIG.model_copy(update={"methods": [method]}))

    with pytest.raises(TemplateMismatch, match="of the agent's own tokens") as caught:
        await run_cycle(memory, cycle.id, seams=seams_of(Misrendered(memory, kitchen.tokenizer), trainer))

    told = str(caught.value)
    assert repr(str(tiny_base)) in told and "rerender_mismatch" in told and "keep_memory_share" in told
    assert trainer.trained == [] and "chat template" in memory.cycles.get(cycle.id).error


async def test_a_later_method_that_could_train_too_few_of_its_own_tokens_is_left_out_and_sft_stays(
    memory, kitchen, trainer, tiny_base
):
    class Misrendered(Kitchen):
        def _script(self, task, is_right, insights):
            graded = super()._script(task, is_right, insights)
            graded.trajectory.memory_text = "<memory>\nNothing that any prompt holds.\n</memory>"
            return graded

    # with the memory segment left in, demonstrations are whole whatever the template writes; preferences never keep it
    config = CONFIG.model_copy(
        update={"demonstrations": CONFIG.demonstrations.model_copy(update={"keep_memory_share": 1.0})}
    )
    cycle = await open_cycle(memory, config)

    await run_cycle(memory, cycle.id, seams=seams_of(Misrendered(memory, kitchen.tokenizer), trainer))

    assert trainer.trained == ["sft"]
    preferences = memory.cycles.get(cycle.id).artifacts["preferences"]
    assert (preferences["num_rows"], preferences["trained_share"]) == (0, 0.0)
    page = (memory.data_dir / "reports" / cycle.id / "report.md").read_text()
    assert "The rows were left out: only 0.0% of the agent's own tokens" in page and repr(str(tiny_base)) in page


async def test_a_cycle_without_practice_is_refused_at_once_when_there_is_nothing_to_learn_from(memory):
    config = CONFIG.model_copy(update={"practice_episodes": 0})

    with pytest.raises(TooFewTrajectories, match="0 of 0 rewarded trajectories"):
        await open_cycle(memory, config)

    assert memory.cycles.unfinished() is None


async def test_corrections_of_lost_episodes_are_enough_to_learn_from(memory, kitchen, trainer):
    kitchen.skill = {0: -1.0}
    config = CONFIG.model_copy(update={"practice_episodes": 0})
    for task in kitchen.tasks("kitchen", Split.PRACTICE, config.demonstrations.min_rows):
        lost = await kitchen.rollout(task, policy=0, use_memory=False, temperature=1.0, seed=1)
        await memory.feedback.post(Feedback(trajectory_id=lost.id, correction="The stove, please."))

    cycle = await open_cycle(memory, config)
    context = CycleContext(memory, seams_of(kitchen, trainer), cycle.id)
    await build_rows(context, METHODS[0])

    made = memory.cycles.get(cycle.id).artifacts["demonstrations"]
    assert made["num_rows"] == made["num_corrections"] == made["num_tasks"] == config.demonstrations.min_rows


async def test_examples_and_corrections_of_tasks_that_choose_the_checkpoint_are_not_learned(memory, kitchen, trainer):
    kitchen.skill = {0: -1.0}
    for task in kitchen.tasks("kitchen", Split.PRACTICE, 6, offset=20):
        lost = await kitchen.rollout(task, policy=0, use_memory=False, temperature=1.0, seed=1)
        await memory.feedback.post(Feedback(trajectory_id=lost.id, correction="The stove, please."))
    await memory.examples.add(expert_examples(20), Origin(environment="kitchen"))
    cycle = await open_cycle(memory, CONFIG)
    context = CycleContext(memory, seams_of(kitchen, trainer), cycle.id)
    await context.save_artifacts(selection_tasks=["practice-3", "practice-22"])

    await build_rows(context, METHODS[0])

    made = memory.cycles.get(cycle.id).artifacts["demonstrations"]
    assert (made["num_imported"], made["num_corrections"]) == (19, 5)


async def test_feedback_of_a_key_that_does_not_teach_is_counted_and_not_learned(memory, kitchen, trainer):
    key, _ = await memory.keys.create("page", ["feedback"])
    teacher, _ = await memory.keys.create("app", ["feedback", "teach"])
    kitchen.skill = {0: -1.0}
    for task in kitchen.tasks("kitchen", Split.PRACTICE, 6):
        for key_id in (key.id, teacher.id):
            lost = await kitchen.rollout(task, policy=0, use_memory=False, temperature=1.0, seed=1)
            said = {"value": True, "correction": "The stove, please."}
            await memory.feedback.post(Feedback(trajectory_id=lost.id, key_id=key_id, user_id="anna", **said))

    cycle = await open_cycle(memory, CONFIG.model_copy(update={"practice_episodes": 0}))
    context = CycleContext(memory, seams_of(kitchen, trainer), cycle.id)
    await build_rows(context, METHODS[0])

    made = memory.cycles.get(cycle.id).artifacts["demonstrations"]
    assert made["num_rows"] == 6 and made["tally"]["not_by_a_teacher"] == 6
    assert [(it["key_id"], it["key_name"]) for it in made["teachers"]] == [(teacher.id, "app")]


async def test_every_cycle_continues_the_adapter_that_came_with_the_model_and_not_that_of_the_cycle_before(
    memory, kitchen, trainer, tmp_path
):
    shipped = TrainingSpec(
        kind="sft",
        name="shipped",
        version=1,
        base_model="base",
        output_dir=tmp_path / "shipped",
        work_dir=tmp_path / "work",
        rows_path=tmp_path / "rows",
        trajectory_ids=["their-1"],
        lora_rank=4,
        lora_alpha=8,
        learning_rate=1e-3,
        epochs=1,
        batch_size=4,
        rows_per_pass=4,
    )
    shipped.rows_path.write_text("")
    await trainer(shipped)
    policy = await memory.policies.draft(adapter_path=str(shipped.output_dir), adapter_digest="")
    await memory.policies.promote(policy.version)
    specs = []

    async def train(spec, **more):
        specs.append(spec)
        return await trainer(spec, **more)

    kitchen.skill = {**dict.fromkeys(range(20), 0.6), 1: 0.3}
    seams = Seams(rollout=kitchen.rollout, tasks=kitchen.tasks, train=train)
    evaluation = EvaluationConfig(num_tasks=8, min_tasks=8, num_sealed_tasks=0)
    config = CONFIG.model_copy(update={"methods": ["sft"], "explore_episodes": 0, "evaluation": evaluation})
    for _ in range(2):
        cycle = await open_cycle(memory, config)
        await run_cycle(memory, cycle.id, seams=seams)

    assert [(spec.version, spec.parent) for spec in specs] == [(2, 1), (3, 1)]
    assert all(spec.lora_rank == 4 and "their-1" in spec.trajectory_ids for spec in specs)
    assert memory.policies.root() == 1


async def test_the_next_cycle_practices_on_other_tasks_and_measures_the_new_incumbent(memory, kitchen, trainer):
    kitchen.skill = {**SKILL, 3: 0.5, 4: 0.5}
    for _ in range(2):
        cycle = await open_cycle(memory, CONFIG)
        verdict = await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    assert verdict.decision == "reject" and verdict.incumbent["policy"] == 2
    assert memory.cycles.get(cycle.id).artifacts["practice_offset"] == CONFIG.num_practice_tasks
    assert memory.policies.active().version == 2


class Windows:
    """The fake at the window's seam: counts the trainings while it was open."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.opened: list[tuple[str, int]] = []
        self.is_open = False

    @contextlib.asynccontextmanager
    async def __call__(self, reason):
        before, self.is_open = len(self.trainer.trained), True
        try:
            yield
        finally:
            self.is_open = False
            self.opened.append((reason, len(self.trainer.trained) - before))


async def test_in_window_mode_only_trainings_happen_while_the_engine_is_stopped(memory, kitchen, trainer):
    window = Windows(trainer)

    async def rollout(*arguments, **more):
        assert not window.is_open, "nobody can play while the engine is stopped"
        return await kitchen.rollout(*arguments, **more)

    seams = replace(seams_of(kitchen, trainer), rollout=rollout, open_window=window)
    cycle = await open_cycle(memory, CONFIG.model_copy(update={"gpu": "window"}), seams=seams)

    await run_cycle(memory, cycle.id, seams=seams)

    assert window.opened == [("training ratchet-v1 (sft)", 1), ("training ratchet-v2 (dpo)", 1)]


async def test_the_window_closes_when_training_fails(memory, kitchen, trainer):
    trainer.fails, window = True, Windows(trainer)
    seams = replace(seams_of(kitchen, trainer), open_window=window)
    cycle = await open_cycle(memory, CONFIG.model_copy(update={"gpu": "window"}), seams=seams)

    with pytest.raises(TrainingError):
        await run_cycle(memory, cycle.id, seams=seams)

    assert not window.is_open and len(window.opened) == 1


async def test_a_training_that_cannot_fit_is_refused_before_the_cycle_opens(memory, kitchen, trainer):
    async def inspect():
        return Hardware([Gpu("0", "tiny card", 2**30, 2**28)], engine_device="0", engine_share=0.85)

    with pytest.raises(TrainingDoesNotFit, match="GPU 0"):
        await open_cycle(memory, CONFIG, seams=replace(seams_of(kitchen, trainer), inspect_hardware=inspect))

    assert memory.cycles.unfinished() is None


async def test_training_gets_the_engines_gpu_and_rows_no_longer_than_its_context(memory, kitchen, trainer):
    specs = []

    async def inspect():
        return Hardware([Gpu("2", "card", 80 * 2**30, 10 * 2**30)], "2", engine_share=0.85, max_model_len=777)

    async def train(spec, **more):
        specs.append(spec)
        return await trainer(spec, **more)

    seams = replace(seams_of(kitchen, trainer), train=train, inspect_hardware=inspect)
    cycle = await open_cycle(memory, CONFIG, seams=seams)

    await run_cycle(memory, cycle.id, seams=seams)

    assert [spec.visible_device for spec in specs] == ["2", "2"]
    assert memory.cycles.get(cycle.id).artifacts["demonstrations"]["max_length_tokens"] == 777


async def test_few_rows_are_trained_in_smaller_batches(memory, kitchen, trainer):
    batches = []

    async def train(spec, **more):
        batches.append((spec.kind, spec.batch_size))
        return await trainer(spec, **more)

    config = CONFIG.model_copy(update={"recipe": {"min_steps": 1000}})
    cycle = await open_cycle(memory, config)

    await run_cycle(memory, cycle.id, seams=replace(seams_of(kitchen, trainer), train=train))

    assert batches == [("sft", 4), ("dpo", 4)]


def expert_examples(number: int) -> list[ExampleContent]:
    """Imported wins, as text."""
    return [
        ExampleContent(
            ExampleKind.DEMONSTRATION,
            [{"role": "assistant", "content": "", "tool_calls": [call(f"cook meal {each} with stove")]}],
            prompt=[{"role": "user", "content": f"Make meal {each}."}],
            tools=[ACT],
            task=f"practice-{each}",
        )
        for each in range(number)
    ]


async def test_a_policy_that_never_won_is_seeded_by_imported_demonstrations(memory, kitchen, trainer):
    kitchen.skill = {0: -1.0, 1: 0.95, 2: 0.95}
    await memory.examples.add(expert_examples(200), Origin(environment="kitchen"))
    demonstrations, _ = (await measure_needs(memory, CONFIG))[:2]
    assert demonstrations.is_met and demonstrations.available == 200
    assert "200 demonstrations imported" in demonstrations.detail
    cycle = await open_cycle(memory, CONFIG)

    verdict = await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))

    assert verdict.decision == "promote" and "sft" in trainer.trained
    summary = memory.cycles.get(cycle.id).artifacts["demonstrations"]
    assert summary["num_rows"] == summary["num_imported"] == 200
    assert [(it["teacher"], it["num_rows"]) for it in summary["teachers"]] == [("import", 200)]
    lineage = json.loads((memory.data_dir / "adapters" / "ratchet-v1" / MANIFEST_NAME).read_text())["trajectory_ids"]
    assert sorted(row.id for row in memory.examples.select(limit=500)) == sorted(lineage)
    page = (memory.data_dir / "reports" / cycle.id / "report.md").read_text()
    assert "200 demonstrations were imported" in page and "import" in page


async def test_imported_examples_of_held_out_tasks_and_of_those_who_may_not_teach_are_not_learned(
    memory, kitchen, trainer
):
    key, _ = await memory.keys.create("a colleague", ["learn"])
    examples = expert_examples(12)
    await memory.examples.add(
        [replace(each, task=each.task.replace("practice", "held-out")) for each in examples[:5]],
        Origin(environment="kitchen"),
    )
    await memory.examples.add(examples[5:], Origin(environment="kitchen", key_id=key.id))
    await memory.examples.add(examples, Origin(environment="garden"))
    cycle = await open_cycle(memory, CONFIG)
    context = CycleContext(memory, seams_of(kitchen, trainer), cycle.id)
    assert not any((await context.read_examples()).values())
    await memory.examples.add(examples[5:7], Origin(environment="kitchen"))
    assert len((await context.read_examples())[ExampleKind.DEMONSTRATION]) == 2


async def test_an_episode_of_a_held_out_task_that_was_played_without_being_marked_is_not_learned(
    memory, kitchen, trainer
):
    kept = await play(memory, task="practice-900000")
    await play(memory, task="held-out-900000")  # no release gate has played it yet
    cycle = await open_cycle(memory, CONFIG)
    pool = await CycleContext(memory, seams_of(kitchen, trainer), cycle.id).read_pool()
    assert [graded.trajectory.id for graded in pool] == [kept.id]


async def test_imported_pairs_count_as_preferences(memory, kitchen, trainer):
    config = CONFIG.model_copy(update={"explore_episodes": 0})
    reply = {"role": "assistant", "content": "Fry it."}
    pairs = [
        ExampleContent(
            ExampleKind.PREFERENCE,
            [reply],
            prompt=[{"role": "user", "content": f"Meal {number}?"}],
            rejected=[{**reply, "content": "Bake it."}],
        )
        for number in range(9)
    ]
    await memory.examples.add(pairs, Origin(environment="kitchen"))
    needs = {need.name: need for need in await measure_needs(memory, config)}
    assert needs["preferences"].available == 9 and "9 were imported" in needs["preferences"].detail
    cycle = await open_cycle(memory, config)
    await run_cycle(memory, cycle.id, seams=seams_of(kitchen, trainer))
    summary = memory.cycles.get(cycle.id).artifacts["preferences"]
    assert {it["teacher"]: it["num_rows"] for it in summary["teachers"]}["import"] == 9
