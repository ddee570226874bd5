"""The choice of methods in a cycle; each sequence of them ends in a candidate."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from memory.adapters import read_manifest
from memory.datasets.examples import Origin
from memory.formats.content import ExampleContent, ExampleKind
from memory.schema import CycleStage, PolicyStage, RewardSource, Split
from memory.store import Memory
from optimizer.config import (
    EvaluationConfig,
    GroupConfig,
    LabelConfig,
    OptimizerConfig,
    RolloutConfig,
    RoundsConfig,
)
from optimizer.cycle.cycle import list_remaining_stages, open_cycle, run_cycle
from optimizer.cycle.methods import METHODS, choose_methods
from optimizer.cycle.rounds import train_in_rounds
from optimizer.cycle.stages import Method, MethodStage
from optimizer.data import demonstrations
from optimizer.data.needs import LoggedData, Need
from optimizer.data.rows import read_rows
from optimizer.errors import OptimizerError, TooFewTrajectories
from optimizer.recipes import METHOD_NAMES, RECIPES
from optimizer.seams import Seams
from tests.memory.episodes import HashingEncoder
from tests.optimizer.conversations import converse, margin
from tests.optimizer.cycle.test_cycle import CONFIG, Died, FakeTrainer, Kitchen

PLAYED = CONFIG.model_copy(
    update={
        "practice_episodes": 24,
        "explore_episodes": 24,
        "labels": LabelConfig(min_rows=4),
        "evaluation": EvaluationConfig(num_tasks=8, min_tasks=8, num_sealed_tasks=0),
    }
)
LOGGED = {"environment": "", "practice_episodes": 0, "explore_episodes": 0}


@pytest.fixture
async def memory(tmp_path, tiny_base):
    opened = Memory.open(tmp_path / "data", encoder=HashingEncoder())
    await opened.policies.register_base(str(tiny_base))
    yield opened
    opened.close()


async def cannot_play(*asked, **how):
    raise AssertionError("there is nothing here that could be played")


def choose(memory, **settings):
    return choose_methods(LoggedData.read(memory, OptimizerConfig(**{**LOGGED, **settings})))


async def test_sixty_thumbs_on_chat_end_in_a_trained_candidate(memory, tokenizer, tiny_base):
    for number in range(60):
        await converse(memory, tokenizer, number, is_good=number % 2 == 0)
    recipe = {"lora_rank": 8, "sft_learning_rate": 5e-3, "sft_epochs": 1, "kto_learning_rate": 5e-3, "kto_epochs": 2}
    config = OptimizerConfig(**LOGGED, recipe=recipe, device="cpu", dtype="float32", num_threads=1)
    seams = Seams(rollout=cannot_play, tasks=cannot_play)  # with the real trainers
    cycle = await open_cycle(memory, config, seams=seams)
    assert cycle.artifacts["methods"] == ["sft", "kto"]

    verdict = await run_cycle(memory, cycle.id, seams=seams)

    candidate = memory.policies.get(verdict.policy)
    assert verdict.decision == "uninformative" and candidate.stage is PolicyStage.CANDIDATE
    artifacts = memory.cycles.get(cycle.id).artifacts
    assert artifacts["kto"]["policy"] == candidate.version and candidate.parent == artifacts["sft"]["policy"]
    unseen = range(200, 208)
    adapters = [None, Path(artifacts["sft"]["adapter"]), Path(candidate.adapter_path)]
    base, imitated, refined = (margin(tiny_base, adapter, tokenizer, unseen) for adapter in adapters)
    assert base < imitated < refined and refined > base + 5
    page = (memory.data_dir / "reports" / cycle.id / "report.md").read_text()
    assert "Methods of learning: SFT, then KTO, because the log has 30 demonstrations (16 needed), 0 pref" in page
    assert "60 labels of 60 tasks: 30 good episodes and 30 bad ones" in page


async def test_thumbs_that_are_mostly_down_are_learned_from_without_imitation(memory, tokenizer):
    for number in range(40):
        await converse(memory, tokenizer, number, is_good=number % 3 == 0)
    assert choose(memory).methods == ("kto",)
    trainer = FakeTrainer()
    seams = Seams(rollout=cannot_play, tasks=cannot_play, train=trainer)
    cycle = await open_cycle(memory, OptimizerConfig(**LOGGED), seams=seams)

    verdict = await run_cycle(memory, cycle.id, seams=seams)

    assert trainer.trained == ["kto"] and memory.policies.get(verdict.policy).parent == 0
    (teacher,) = memory.cycles.get(cycle.id).artifacts["labels"]["teachers"]
    assert teacher["teacher"] == "feedback" and teacher["num_rows"] == 40


async def test_a_report_names_the_rows_that_a_verifier_graded_and_how_far_it_agrees(memory, tokenizer):
    for number in range(40):
        await converse(memory, tokenizer, number, is_good=number % 3 == 0, by_verifier=True)
    verifier = memory.data_dir / "verifiers" / "v2"
    verifier.mkdir(parents=True)
    (verifier / "report.json").write_text(json.dumps({"description": "it agrees with 19 of 20 rewards"}))
    seams = Seams(rollout=cannot_play, tasks=cannot_play, train=FakeTrainer())
    cycle = await open_cycle(memory, OptimizerConfig(**LOGGED), seams=seams)

    await run_cycle(memory, cycle.id, seams=seams)

    page = (memory.data_dir / "reports" / cycle.id / "report.md").read_text()
    assert "| default | verifier | none | unnamed | 40 |" in page and "it agrees with 19 of 20 rewards" in page


async def test_thumbs_of_one_kind_alone_are_imitated_or_refused(memory, tokenizer):
    for number in range(20):
        await converse(memory, tokenizer, number, is_good=False)
    with pytest.raises(TooFewTrajectories, match="16 are missing"):
        await open_cycle(memory, OptimizerConfig(**LOGGED))
    for number in range(20, 40):
        await converse(memory, tokenizer, number, is_good=True)
    assert choose(memory, labels={"min_rows": 21}).methods == ("sft",)


async def test_pairs_in_the_log_are_preferred_to_labels(memory, tokenizer):
    for number in range(40):
        await converse(memory, tokenizer, number // 2, is_good=number % 2 == 0)

    choice = choose(memory)

    assert choice.methods == ("sft", "dpo")
    assert "20 demonstrations (16 needed), 20 preferences (12 needed), 20 labels (12 needed)" in choice.reason


async def test_feedback_of_a_key_that_does_not_teach_chooses_no_method(memory, tokenizer):
    key, _ = await memory.keys.create("page", ["feedback"])
    for number in range(40):
        await converse(memory, tokenizer, number, is_good=number % 2 == 0, key_id=key.id)

    assert "0 demonstrations (16 needed), 0 preferences (12 needed), 0 labels" in choose(memory).reason


async def test_where_something_is_played_practice_and_exploration_come_first(memory):
    assert choose(memory, environment="kitchen", practice_episodes=4, explore_episodes=4).methods == ("sft", "dpo")
    assert choose(memory, environment="kitchen", practice_episodes=4, methods=["kto"]).methods == ("kto",)


async def test_where_something_is_played_imported_labels_are_learned_from_besides(memory):
    labels = [
        ExampleContent(
            ExampleKind.LABEL,
            [{"role": "assistant", "content": f"answer {number}"}],
            prompt=[{"role": "user", "content": f"question {number}"}],
            is_good=number % 2 == 0,
        )
        for number in range(8)
    ]
    await memory.examples.add(labels, Origin(environment="kitchen", source="file", format="trl"))
    played = {"environment": "kitchen", "practice_episodes": 4, "explore_episodes": 4}

    choice = choose(memory, **played, labels={"min_rows": 4})

    assert choice.methods == ("sft", "dpo", "kto") and "8 labels were imported" in choice.reason
    assert choose(memory, **played, labels={"min_rows": 5}).methods == ("sft", "dpo")


def kitchen_seams(memory, tokenizer, trainer, skill: dict[int, float]) -> Seams:
    kitchen = Kitchen(memory, tokenizer, skill={**dict.fromkeys(range(20), 0.5), **skill})
    return Seams(rollout=kitchen.rollout, tasks=kitchen.tasks, train=trainer)


@pytest.mark.parametrize("methods", [["sft", "kto"], ["dpo"], ["sft", "kto", "dpo"]])
async def test_each_method_continues_the_adapter_of_the_one_before(memory, tokenizer, methods):
    trainer, parents = FakeTrainer(), {}

    async def train(spec, **more):
        parents[spec.version] = spec.parent
        return await trainer(spec, **more)

    seams = kitchen_seams(memory, tokenizer, train, {})
    cycle = await open_cycle(memory, PLAYED.model_copy(update={"methods": methods}), seams=seams)
    assert cycle.artifacts["methods"] == methods and "`optimizer.methods`" in cycle.artifacts["methods_reason"]

    verdict = await run_cycle(memory, cycle.id, seams=seams)

    assert trainer.trained == methods
    assert list(parents.values()) == [0, *list(parents)[:-1]]
    assert memory.cycles.get(cycle.id).stage == CycleStage.COMPLETED and verdict.policy == list(parents)[-1]
    report = json.loads((memory.data_dir / "reports" / cycle.id / "report.json").read_text())
    assert {"base-off", *(f"{name}-off" for name in methods)} <= set(report["cells"])


async def test_labels_are_found_in_episodes_of_the_policy_that_is_continued(memory, tokenizer):
    trainer = FakeTrainer()
    # all episodes of practice are wins, so they give no bad labels
    seams = kitchen_seams(memory, tokenizer, trainer, {0: 1.1})
    cycle = await open_cycle(memory, PLAYED.model_copy(update={"methods": ["sft", "kto"]}), seams=seams)

    await run_cycle(memory, cycle.id, seams=seams)

    artifacts = memory.cycles.get(cycle.id).artifacts
    assert trainer.trained == ["sft", "kto"] and artifacts["labels"]["num_bad"] >= 4
    assert list(artifacts["stage_seconds"]) == ["collect", "demonstrate", "sft", "explore", "kto", "evaluate", "settle"]
    page = (memory.data_dir / "reports" / cycle.id / "report.md").read_text()
    assert "## Time" in page and "| explore | 0." in page


def test_methods_that_explore_share_the_episodes_of_the_first():
    stages = list_remaining_stages(PLAYED, ["sft", "kto", "dpo"], "collect")
    names = ["collect", "demonstrate", "sft", "explore", "kto", "dpo", "evaluate", "settle"]
    assert [stage.name for stage in stages] == names


async def test_a_cycle_with_a_method_of_another_version_ends_with_the_remedy(memory, tokenizer):
    seams = kitchen_seams(memory, tokenizer, FakeTrainer(), {})
    cycle = await open_cycle(memory, PLAYED, seams=seams)
    await memory.cycles.save(cycle.id, artifacts={"methods": ["sft", "ppo"]})

    with pytest.raises(OptimizerError, match=r"'ppo'.*start another cycle"):
        await run_cycle(memory, cycle.id, seams=seams)

    closed = memory.cycles.get(cycle.id)
    assert closed.stage == CycleStage.ERROR and "start another" in closed.error


async def test_a_later_method_continues_the_checkpoint_that_was_chosen(memory, tokenizer):
    trainer = FakeTrainer()
    # SFT is v1; DPO after each of three epochs v2, v3 and v4, of which v3 plays best; KTO's are no better
    seams = kitchen_seams(memory, tokenizer, trainer, {3: 1.1})
    update = {"methods": ["sft", "dpo", "kto"], "num_selection_tasks": 12}
    cycle = await open_cycle(memory, PLAYED.model_copy(update=update), seams=seams)

    verdict = await run_cycle(memory, cycle.id, seams=seams)

    artifacts = memory.cycles.get(cycle.id).artifacts
    assert artifacts["starts"] == {"dpo": 1, "kto": 3} and trainer.trained == ["sft", "dpo", "kto"]
    assert verdict.policy == artifacts["selection"]["chosen"] == 3
    report = json.loads((memory.data_dir / "reports" / cycle.id / "report.json").read_text())
    # KTO's checkpoints were not chosen, and v3 is DPO's
    assert {name: cell["policy"] for name, cell in report["cells"].items() if name.endswith("-off")} == {
        "base-off": 0,
        "sft-off": 1,
        "dpo-off": 3,
    }
    learned_from = {memory.trajectories.get(id_).task for id_ in artifacts["labels"]["trajectory_ids"]}
    assert learned_from and not learned_from & set(artifacts["selection_tasks"])


async def test_a_first_method_with_too_few_rows_ends_the_cycle(memory, tokenizer):
    trainer = FakeTrainer()
    seams = kitchen_seams(memory, tokenizer, trainer, {0: 1.1})  # without a lost episode there is no pair
    cycle = await open_cycle(memory, PLAYED.model_copy(update={"methods": ["dpo"]}), seams=seams)

    with pytest.raises(TooFewTrajectories, match=r"0 preferences could be made.*4 are missing"):
        await run_cycle(memory, cycle.id, seams=seams)

    assert trainer.trained == []


ROUNDS = PLAYED.model_copy(
    update={
        "methods": ["sft", "grpo"],
        "groups": GroupConfig(rounds=2, num_tasks=6, num_tries=6, min_rows=1),
        "num_selection_tasks": 12,
    }
)


async def test_each_round_of_grpo_plays_with_the_policy_of_the_round_before(memory, tokenizer):
    specs = []

    async def train(spec, **more):
        specs.append(spec)
        return await FakeTrainer()(spec, **more)

    seams = kitchen_seams(memory, tokenizer, train, {1: 0.2, 2: 0.45, 3: 1.1})
    cycle = await open_cycle(memory, ROUNDS, seams=seams)

    verdict = await run_cycle(memory, cycle.id, seams=seams)

    assert [(spec.kind, spec.version, spec.parent) for spec in specs] == [("sft", 1, 0), ("grpo", 2, 1), ("grpo", 3, 2)]
    rows = read_rows(specs[-1].rows_path)
    assert {memory.trajectories.get(row["trajectory_id"]).policy for row in rows} == {2}
    assert all(row["sampled_logps"] == [-0.5 * own for own in row["mask"]] for row in rows)
    artifacts = memory.cycles.get(cycle.id).artifacts
    assert artifacts["num_rounds"] == {"grpo": 2} and verdict.policy == artifacts["selection"]["chosen"] == 3
    learned_from = read_manifest(Path(memory.policies.get(3).adapter_path)).trajectory_ids
    assert {memory.trajectories.get(id_).policy for id_ in learned_from} == {0, 1, 2}


ROWS_OF_SUCCESSES = ("demonstrations", "control_rows")


async def test_the_control_is_trained_by_sft_on_the_episodes_of_exploration_too_and_is_no_candidate(memory, tokenizer):
    specs = []

    async def train(spec, **more):
        specs.append(spec)
        return await FakeTrainer()(spec, **more)

    # without selection tasks the candidate is the last training; the control, trained after it, would win more
    config = PLAYED.model_copy(update={"methods": ["sft", "kto"], "control": True, "num_selection_tasks": 0})
    kitchen = kitchen_seams(memory, tokenizer, train, {1: 0.5, 2: 0.9, 3: 1.1})
    wins = Counter()

    async def play(task, **how):
        played = await kitchen.rollout(task, **how)
        if task.split is Split.PRACTICE:
            wins[played.policy] += memory.trajectories.effective_reward(played.id) == 1.0
        return played

    seams = replace(kitchen, rollout=play)
    cycle = await open_cycle(memory, config, seams=seams)

    verdict = await run_cycle(memory, cycle.id, seams=seams)

    assert [(spec.kind, spec.version, spec.parent) for spec in specs] == [("sft", 1, 0), ("kto", 2, 1), ("sft", 3, 0)]
    assert verdict.policy == 2 and memory.policies.get(3).stage is PolicyStage.DRAFT
    artifacts = memory.cycles.get(cycle.id).artifacts
    # every success of a task is the same here, so most of them are duplicates of a row
    num_read = {name: artifacts[name]["num_rows"] + artifacts[name]["tally"]["duplicate"] for name in ROWS_OF_SUCCESSES}
    assert wins[1] and num_read == {"demonstrations": wins[0], "control_rows": wins[0] + wins[1]}
    report = json.loads((memory.data_dir / "reports" / cycle.id / "report.json").read_text())
    assert report["cells"]["control-off"]["policy"] == 3 and report["cells"]["kto-off"]["policy"] == 2
    assert "SFT+KTO against SFT on all episodes, memory off" in [it["title"] for it in report["comparisons"]]
    assert report["training"]["control"]["policy"] == 3 and report["control_rows"]["num_rows"] == len(
        read_rows(specs[2].rows_path)
    )


async def test_a_cycle_of_sft_alone_has_no_control(memory, tokenizer):
    trainer = FakeTrainer()
    seams = kitchen_seams(memory, tokenizer, trainer, {1: 1.1})
    cycle = await open_cycle(memory, PLAYED.model_copy(update={"methods": ["sft"], "control": True}), seams=seams)

    await run_cycle(memory, cycle.id, seams=seams)

    assert trainer.trained == ["sft"]


async def test_a_round_that_makes_it_worse_is_not_passed_on(memory, tokenizer):
    trainer, parents = FakeTrainer(), []

    async def train(spec, **more):
        parents.append(spec.parent)
        return await trainer(spec, **more)

    seams = kitchen_seams(memory, tokenizer, train, {1: 0.8, 2: -1.0, 3: 0.95})
    cycle = await open_cycle(memory, ROUNDS, seams=seams)

    await run_cycle(memory, cycle.id, seams=seams)

    assert parents == [0, 1, 1]


async def test_a_round_without_rows_ends_the_training_and_leaves_none_of_the_round_before(memory, tokenizer):
    trainer = FakeTrainer()
    seams = kitchen_seams(memory, tokenizer, trainer, {2: 1.1})  # a policy that always wins gives no group
    cycle = await open_cycle(memory, ROUNDS, seams=seams)

    await run_cycle(memory, cycle.id, seams=seams)

    assert trainer.trained == ["sft", "grpo"]
    assert [it.name for it in (memory.data_dir / "cycles" / cycle.id).glob("*.jsonl")] == ["demonstrations.jsonl"]


async def test_a_process_that_dies_between_rounds_goes_on_with_the_next(memory, tokenizer):
    trainer, deaths = FakeTrainer(), [True]

    async def train(spec, **more):
        if spec.version == 3 and deaths:
            deaths.pop()
            raise Died
        return await trainer(spec, **more)

    kitchen = Kitchen(memory, tokenizer, skill={**dict.fromkeys(range(20), 0.5), 1: 0.2, 2: 0.45, 3: 1.1})
    seams = Seams(rollout=kitchen.rollout, tasks=kitchen.tasks, train=train)
    cycle = await open_cycle(memory, ROUNDS, seams=seams)
    with pytest.raises(Died):
        await run_cycle(memory, cycle.id, seams=seams)
    num_played = kitchen.num_played

    verdict = await run_cycle(memory, cycle.id, seams=seams)

    assert trainer.trained == ["sft", "grpo", "grpo"] and verdict.policy == 3
    cells, selection = 6 * 8, 12
    assert kitchen.num_played == num_played + selection + cells  # no round is played again


@pytest.mark.parametrize(("method", "rows"), [("dpo", "preferences"), ("grpo", "groups")])
async def test_a_thumb_that_arrives_after_a_training_leaves_its_rows_as_they_were(memory, tokenizer, method, rows):
    trainer, deaths = FakeTrainer(), [True]

    async def train(spec, **more):
        manifest = await trainer(spec, **more)
        if spec.kind == method and deaths:
            deaths.pop()
            raise Died
        return manifest

    seams = kitchen_seams(memory, tokenizer, train, {})
    update = {"methods": ["sft", method], "groups": ROUNDS.groups.model_copy(update={"rounds": 1})}
    cycle = await open_cycle(memory, ROUNDS.model_copy(update=update), seams=seams)
    with pytest.raises(Died):
        await run_cycle(memory, cycle.id, seams=seams)
    before = memory.cycles.get(cycle.id).artifacts[rows]
    for id_ in before["trajectory_ids"]:
        await memory.trajectories.reward(id_, 0.0, RewardSource.USER)

    await run_cycle(memory, cycle.id, seams=seams)

    closed = memory.cycles.get(cycle.id)
    assert closed.stage == CycleStage.COMPLETED and trainer.trained == ["sft", method]
    assert closed.artifacts[rows] == before and closed.artifacts[method]["policy"] > 1


async def test_distillation_plays_with_and_without_memory_and_learns_where_memory_wins(memory, tokenizer):
    trainer = FakeTrainer()
    seams = kitchen_seams(memory, tokenizer, trainer, {1: 0.4, 2: 0.4})
    update = {"methods": ["sft", "distill"], "rollouts": RolloutConfig(rounds=1, num_tasks=12, num_tries=4)}
    cycle = await open_cycle(memory, PLAYED.model_copy(update=update), seams=seams)

    await run_cycle(memory, cycle.id, seams=seams)

    assert trainer.trained == ["sft", "distill"]
    summary = memory.cycles.get(cycle.id).artifacts["rollouts"]
    assert summary["won_with_memory"] > summary["won_without"]
    rolled = [memory.trajectories.get(id_) for id_ in summary["trajectory_ids"]]
    assert rolled and all(it.policy == 1 and not it.memory_text for it in rolled)
    page = (memory.data_dir / "reports" / cycle.id / "report.md").read_text()
    assert "own rollouts of 12 tasks, to be scored with memory in view" in page


class EchoConfig(RoundsConfig):
    method = "echo"


class WithEchoes(OptimizerConfig):
    echoes: EchoConfig = EchoConfig(num_tasks=6, min_rows=1)


ECHO = Method(
    name="echo",
    title="Echo",
    rows="echoes",
    build=demonstrations.build,
    min_rows=lambda config: config.echoes.min_rows,
    measure_need=lambda logged, rounds: Need("echoes", needed=1, available=0, playable=6),
    describe=demonstrations.describe,
    note="Echo of its own successes",
    stages=(MethodStage("echo", train_in_rounds),),
    reads_new_episodes_only=lambda config: True,
)


@pytest.fixture
def echo(monkeypatch):
    """A further method of learning that plays, registered where the docstring of optimizer/cycle/methods.py says."""
    for _, recipe in RECIPES:
        monkeypatch.setitem(recipe.methods, "echo", recipe.methods["grpo"])
    monkeypatch.setattr("optimizer.config.METHOD_NAMES", (*METHOD_NAMES, "echo"))
    monkeypatch.setattr("optimizer.cycle.context.OptimizerConfig", WithEchoes)
    monkeypatch.setattr("optimizer.cycle.methods.METHODS", (*METHODS, ECHO))


async def test_a_further_method_that_is_registered_is_trained_played_and_reported(memory, tokenizer, echo):
    trainer = FakeTrainer()
    seams = kitchen_seams(memory, tokenizer, trainer, {})
    config = WithEchoes.model_validate({**PLAYED.model_dump(), "methods": ["sft", "echo"]})
    cycle = await open_cycle(memory, config, seams=seams)

    await run_cycle(memory, cycle.id, seams=seams)

    artifacts = memory.cycles.get(cycle.id).artifacts
    assert trainer.trained == ["sft", "echo", "echo"] and artifacts["num_rounds"] == {"echo": 2}
    assert "Echo" in artifacts["methods_reason"] and artifacts["echoes"]["num_rows"]
    report = json.loads((memory.data_dir / "reports" / cycle.id / "report.json").read_text())
    assert "echo-off" in report["cells"] and report["training"]["echo"]["policy"] == artifacts["echo"]["policy"]


def test_a_further_method_whose_section_is_of_rounds_needs_an_environment(echo):
    with pytest.raises(ValidationError, match=r"\['echo'\].*name an environment"):
        WithEchoes(**LOGGED, methods=["echo"])


def test_the_methods_that_train_in_rounds_are_those_whose_section_names_them():
    in_rounds = [method for method in METHODS if any(stage.run is train_in_rounds for stage in method.stages)]
    config = OptimizerConfig()

    assert [method for method in METHODS if config.find_rounds(method.name)] == in_rounds
    assert all(config.find_rounds(method.name) is getattr(config, method.rows) for method in in_rounds)
