"""A verifier from graded episodes to grades: rows, parts, and the pocket model on a decidable toy problem."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory.records.trajectories import GradedTrajectory
from memory.schema import Feedback, RewardSource, Split, TrajectoryStage, Trust
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.errors import TooFewTrajectories
from optimizer.training.base import load_tokenizer
from optimizer.training.spec import TrainingSpec
from optimizer.verifier.calibration import Calibration
from optimizer.verifier.report import describe
from optimizer.verifier.rows import (
    QUESTION,
    VerifierExample,
    build_examples,
    frame_question,
    split_by_task,
    to_row,
)
from optimizer.verifier.verifier import VerifierSetup, grade_ungraded, train_verifier
from tests.memory.episodes import PATIENT, HashingEncoder
from tests.optimizer.worlds import live

POCKET = str(Path(__file__).parents[3] / "runtime" / "pocket")
FOODS = ("carrot", "onion", "banana", "pork chop", "red potato", "white tuna", "purple potato", "yellow potato", "egg")
FOODS = (*FOODS, "apple", "lettuce", "parsley", "pepper", "salmon", "tomato", "cheese")
RECIPES = (1, 2)
CONFIG = OptimizerConfig(environment="kitchen", device="cpu", num_threads=1)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        yield memory


def toy(tokenizer: Any) -> list[GradedTrajectory]:
    """Return one good and one bad episode of each task: food is fried on the stove, never in the oven."""
    return [
        live(
            [(f"cook {food} with {appliance}", "You hear a click.")],
            tokenizer=tokenizer,
            task=f"{number}-{food}",
            text=f"Recipe {number}: fry the {food}.",
            is_success=appliance == "stove",
        )
        for number in RECIPES
        for food in FOODS
        for appliance in ("stove", "oven")
    ]


async def store(memory: Memory, episode: GradedTrajectory, *, reward: float | None) -> str:
    """Store an episode as the runtime does."""
    trajectory = episode.trajectory.model_copy(update={"stage": TrajectoryStage.RUNNING})
    await memory.trajectories.open(trajectory)
    for step in episode.steps:
        await memory.trajectories.append(step, trajectory=trajectory)
    await memory.trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED, answer="done")
    if reward is not None:
        await memory.trajectories.reward(trajectory.id, reward, RewardSource.ENVIRONMENT)
    return trajectory.id


async def thumb(memory: Memory, trajectory_id: str, value: bool) -> None:
    await memory.feedback.post(Feedback(id="", trajectory_id=trajectory_id, value=value))


def examples_of(graded: list[GradedTrajectory], tokenizer: Any, **fields: Any) -> tuple[list[VerifierExample], Counter]:
    counts: Counter[str] = Counter()
    given = {"per_task": 4, "max_length_tokens": 2048, **fields}
    return build_examples(graded, tokenizer, frame_question(tokenizer), counts=counts, **given), counts


def test_a_row_is_the_episode_the_question_and_a_trained_answer(tokenizer):
    good = live([("cook carrot with stove", "Fried.")], tokenizer=tokenizer)
    question = frame_question(tokenizer)
    (example,), _ = examples_of([good], tokenizer)

    row = to_row(example, question)

    text = tokenizer.decode(row.input_ids)
    assert text.startswith(tokenizer.decode([*good.steps[0].prompt_token_ids, *good.steps[0].output_token_ids]))
    assert f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n" in text and "Fried." not in text
    assert row.mask == [0] * (len(row.input_ids) - 1) + [1]
    assert row.input_ids[-1] == question.yes == tokenizer("yes")["input_ids"][0]
    assert to_row(replace(example, is_success=False), question).input_ids[-1] == question.no


def test_a_reply_that_was_cut_is_ended_before_the_question(tokenizer):
    question = frame_question(tokenizer)
    assert question.put_to([1, 2]) == [1, 2, tokenizer.eos_token_id, *question.suffix]
    assert question.put_to([1, tokenizer.eos_token_id]) == [1, tokenizer.eos_token_id, *question.suffix]


def test_what_may_not_teach_is_no_example_and_a_verifier_does_not_learn_from_itself(tokenizer):
    graded = toy(tokenizer)[:5]
    graded[0] = replace(graded[0], source=RewardSource.VERIFIER)
    graded[1].trajectory.trust = Trust.UNTRUSTED
    examples, counts = examples_of(graded, tokenizer)
    assert {each.trajectory_id for each in examples} == {each.trajectory.id for each in graded[2:]}
    assert counts == {"by_a_verifier": 1, "untrusted": 1, "used": 3}
    assert examples_of(graded, tokenizer, max_length_tokens=20)[1]["too_long"] == 3


def test_of_a_task_the_newest_of_a_kind_count(tokenizer):
    tries = [live([("look", "")], tokenizer=tokenizer, is_success=False) for _ in range(3)]
    examples, counts = examples_of(tries, tokenizer, per_task=2)
    assert [each.trajectory_id for each in examples] == [each.trajectory.id for each in tries[1:]]
    assert counts["over_task_cap"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_no_task_is_in_two_parts(tokenizer, seed: int):
    examples, _ = examples_of(toy(tokenizer), tokenizer)
    parts = split_by_task(examples, seed)
    tasks = [{each.task for each in part} for part in parts.values()]
    assert sum(map(len, tasks)) == len(set.union(*tasks)) == len(FOODS) * len(RECIPES)
    assert sum(map(len, parts.values())) == len(examples)
    assert list(map(len, tasks)) == [19, 7, 6]


async def test_too_few_episodes_are_refused_with_their_numbers(memory: Memory):
    await memory.policies.register_base(POCKET)
    for episode in toy(load_tokenizer(POCKET))[:4]:
        await store(memory, episode, reward=episode.reward)
    with pytest.raises(TooFewTrajectories, match="needs 4 good and 4 bad episodes for training, and there are 1 and 1"):
        await train_verifier(VerifierSetup(memory, CONFIG, ["kitchen"]))
    assert not (memory.data_dir / "verifiers").exists()


class ScriptedVerifier:
    """Trains nothing, and scores each prompt by a keyword."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.trained: list[TrainingSpec] = []

    async def train(self, spec: TrainingSpec, **_: Any) -> None:
        self.trained.append(spec)

    async def score(self, spec: TrainingSpec, **_: Any) -> list[float]:
        rows = [json.loads(line) for line in spec.rows_path.read_text().splitlines()]
        texts = [self.tokenizer.decode(row["input_ids"]) for row in rows]
        margins = [2.0 if "with stove" in text else -2.0 for text in texts]
        return [0.0 if row["is_base"] else margin for row, margin in zip(rows, margins, strict=True)]


async def test_the_report_says_whether_people_agree(memory: Memory):
    await memory.policies.register_base(POCKET)
    tokenizer = load_tokenizer(POCKET)
    scripted = ScriptedVerifier(tokenizer)
    setup = VerifierSetup(memory, CONFIG, ["kitchen"], train=scripted.train, score=scripted.score)
    stored = [(await store(memory, each, reward=each.reward), each) for each in toy(tokenizer)]

    report = await train_verifier(setup)

    assert (report["auc"], report["base_auc"], report["agreement_with_people"]) == (1.0, 0.5, None)
    assert "its agreement with people is unknown" in describe(report)
    (spec,) = scripted.trained
    assert len(spec.trajectory_ids) == report["parts"]["training"]["num_episodes"] == 38

    for number, (trajectory_id, each) in enumerate(stored):  # people disagree on one in five
        await thumb(memory, trajectory_id, each.is_success if number % 5 else not each.is_success)
    again = await train_verifier(setup)

    people = again["agreement_with_people"]
    assert again["version"] == 2 and people["num_episodes"] == again["parts"]["test"]["num_episodes"]
    assert 0 < people["num_right"] < people["num_episodes"] and people["low"] < people["high"]
    assert f"agrees in {people['num_right']} of {people['num_episodes']} rewards" in describe(again)
    assert (report["calibrated_on"], again["calibrated_on"]) == ("all", "people")
    assert "chosen on the rewards of all sources" in describe(report)
    assert "chosen on the rewards of people" in describe(again)


async def test_where_people_disagree_with_the_environment_the_calibration_is_theirs(memory: Memory):
    await memory.policies.register_base(POCKET)
    tokenizer = load_tokenizer(POCKET)
    scripted = ScriptedVerifier(tokenizer)
    setup = VerifierSetup(memory, CONFIG, ["kitchen"], train=scripted.train, score=scripted.score)
    # the environment rewards the oven; people rate three of four episodes, and they say the stove
    for number, episode in enumerate(toy(tokenizer)):
        trajectory_id = await store(memory, episode, reward=float(not episode.is_success))
        if number % 8 < 6:
            await thumb(memory, trajectory_id, episode.is_success)

    report = await train_verifier(setup)

    assert report["calibrated_on"] == "people"
    # a quarter of all rewards says the opposite: fitted to all, it would be near 0.75
    assert Calibration(**report["calibration"]).probabilities([2.0])[0] > 0.8


async def test_a_verifier_grades_only_what_it_was_made_for(memory: Memory):
    await memory.policies.register_base(POCKET)
    tokenizer = load_tokenizer(POCKET)
    scripted = ScriptedVerifier(tokenizer)
    setup = VerifierSetup(memory, CONFIG, ["kitchen"], train=scripted.train, score=scripted.score)
    with pytest.raises(ValueError, match="there is no verifier yet"):
        await grade_ungraded(setup, limit=5)
    for each in toy(tokenizer):
        await store(memory, each, reward=each.reward)
    await train_verifier(setup)
    new = [await store(memory, each, reward=None) for each in toy(tokenizer)[:2]]
    held_out = toy(tokenizer)[2]
    held_out.trajectory.split = Split.HELD_OUT
    await store(memory, held_out, reward=None)

    graded = await grade_ungraded(setup, limit=5)

    assert (graded["num_good"], graded["num_bad"], graded["left_out"]) == (1, 1, {})
    (reward,) = memory.trajectories.rewards(new[0])
    assert (reward.value, reward.source) == (1.0, RewardSource.VERIFIER) and reward.reason.startswith("verifier v1: 0.")
    assert memory.trajectories.rewards(held_out.trajectory.id) == []
    assert (await grade_ungraded(setup, limit=5))["num_good"] == 0
    with pytest.raises(ValueError, match=r"learned of \['kitchen'\] alone, and nothing of \['garden'\]"):
        await grade_ungraded(replace(setup, environments=["garden"]), limit=5)


@pytest.mark.timeout(900)
async def test_the_pocket_model_learns_to_tell_the_stove_from_the_oven(memory: Memory):
    await memory.policies.register_base(POCKET)
    tokenizer = load_tokenizer(POCKET)
    for episode in toy(tokenizer):
        await store(memory, episode, reward=episode.reward)
    setup = VerifierSetup(memory, CONFIG, ["kitchen"])

    report = await train_verifier(setup)

    assert report["auc"] > 0.85 and report["auc_interval"][0] > 0.5
    fresh = toy(tokenizer)[:4]
    for episode in fresh:
        await store(memory, episode, reward=None)
    graded = await grade_ungraded(setup, limit=10)
    assert graded["num_good"] + graded["num_bad"] == 4
    learned = {it.trajectory.id: it for it in memory.trajectories.learnable(is_for_weights=True)}
    assert all(learned[episode.trajectory.id].source is RewardSource.VERIFIER for episode in fresh)
