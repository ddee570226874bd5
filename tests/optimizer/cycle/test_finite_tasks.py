"""Environments with few tasks: practice repeats them, and selection and held-out tasks are not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from memory.datasets.examples import Origin
from memory.formats.content import ExampleContent, ExampleKind
from memory.schema import CycleStage, Feedback, Split, Task
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.cycle.context import CycleContext
from optimizer.cycle.methods import choose_methods
from optimizer.cycle.readiness import fit_to_environment, measure_surroundings
from optimizer.cycle.selection import selection_tasks
from optimizer.cycle.stages import find_practice_offset
from optimizer.data.needs import LoggedData, Need
from optimizer.seams import Seams
from tests.memory.episodes import HashingEncoder, play

NUM_TASKS = {Split.PRACTICE: 10, Split.HELD_OUT: 7}


def list_tasks(environment: str, split: Split, num_tasks: int, offset: int = 0) -> list[Task]:
    names = [f"{split.value}-{number}" for number in range(NUM_TASKS[split])]
    return [Task(environment, name, "sums", split) for name in names[offset : offset + num_tasks]]


async def never(*_, **__):
    raise AssertionError("nothing is played here")


def find_tasks(environment: str, task: str | None, texts: Sequence[str]) -> list[str]:
    if task is not None and task.startswith("practice-"):
        return [task]
    return [f"practice-{text[4]}" for text in texts if text.startswith("Sum ")]


SEAMS = Seams(rollout=never, tasks=list_tasks, find_tasks=find_tasks)
CONFIG = OptimizerConfig(environment="sums", num_practice_tasks=64, practice_episodes=25, explore_episodes=12)


@pytest.fixture
def memory(tmp_path: Path):
    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        yield memory


async def open_context(memory: Memory, **changes) -> CycleContext:
    await memory.policies.register_base("pocket")
    config = fit_to_environment(CONFIG, SEAMS).model_copy(update=changes)
    cycle = await memory.cycles.open(config.model_dump(mode="json"))
    return CycleContext(memory, SEAMS, cycle.id)


async def surroundings(memory: Memory, config: OptimizerConfig, seams: Seams) -> list[Need]:
    return await measure_surroundings(memory, config, seams, choose_methods(LoggedData.read(memory, config)))


def numbers(tasks: list[Task]) -> list[int]:
    return [int(task.name.rpartition("-")[2]) for task in tasks]


def test_rounds_get_shorter_and_more_and_the_episodes_stay():
    config = fit_to_environment(CONFIG, SEAMS)
    assert (config.num_practice_tasks, config.practice_rounds, config.explore_rounds) == (10, [10, 10, 5], [10, 2])
    assert fit_to_environment(CONFIG.model_copy(update={"num_practice_tasks": 4}), SEAMS).num_practice_tasks == 4


async def test_practice_goes_on_from_the_first_task_after_the_last(memory: Memory):
    context = await open_context(memory, num_practice_tasks=4)
    for offset, expected in [(0, [0, 1, 2, 3]), (8, [8, 9, 0, 1]), (24, [4, 5, 6, 7])]:
        await context.save_artifacts(practice_offset=offset, practice_end=offset + 4)
        assert numbers(context.practice_tasks()) == expected


async def test_practice_in_one_environment_moves_no_other(memory: Memory):
    for environment, end in [("sums", 4), ("textworld", 64), ("sums", 8)]:
        cycle = await memory.cycles.open(CONFIG.model_copy(update={"environment": environment}).model_dump(mode="json"))
        await memory.cycles.save(cycle.id, stage=CycleStage.ERROR, error="stopped", artifacts={"practice_end": end})
    assert find_practice_offset(await open_context(memory)) == 8


async def test_a_candidate_is_chosen_by_tasks_that_this_cycle_does_not_practise(memory: Memory):
    context = await open_context(memory, num_practice_tasks=4, num_selection_tasks=8)
    await context.save_artifacts(practice_offset=8, practice_end=12)
    await play(memory, environment="sums", kind="sums", task="practice-3", reward=1.0)
    assert numbers(await selection_tasks(context)) == [2, 4, 5, 6, 7]


async def test_no_task_that_was_demonstrated_or_corrected_chooses_a_candidate(memory: Memory):
    context = await open_context(memory, num_practice_tasks=4, num_selection_tasks=8)
    await context.save_artifacts(practice_offset=8, practice_end=12)
    shown = ExampleContent(ExampleKind.DEMONSTRATION, [{"role": "assistant", "content": "4"}], task="practice-4")
    nameless = replace(shown, completion=[{"role": "user", "content": "Sum 6?"}, *shown.completion], task="row-17")
    await memory.examples.add([shown, nameless], Origin(environment="sums"))
    wrong = await play(memory, environment="sums", kind="sums", task="practice-5", reward=None)
    await memory.feedback.post(Feedback(trajectory_id=wrong.id, correction="5"))
    assert numbers(await selection_tasks(context)) == [2, 3, 7]
    await memory.examples.add(
        [replace(nameless, completion=[{"role": "user", "content": "Sum 7?"}, *shown.completion])],
        Origin(environment="sums"),
    )
    (learned,) = [rows for rows in (await context.read_examples()).values() if rows]
    assert [each.question for each in learned] == ["", "Sum 6?"]  # the newest asks what chooses the policy


async def test_none_is_left_to_choose_by_where_all_are_practised(memory: Memory):
    everything = await open_context(memory)
    await everything.save_artifacts(practice_offset=0, practice_end=10)
    assert await selection_tasks(everything) == []


async def test_an_environment_without_practice_tasks_cannot_practise(memory: Memory, tiny_base: Path):
    await memory.policies.register_base(str(tiny_base))
    empty = replace(SEAMS, tasks=lambda environment, split, num_tasks, offset=0: [])
    need, *_ = await surroundings(memory, CONFIG, empty)
    assert need.name == "practice tasks" and need.is_required and not need.is_met
    assert need.detail == "'sums' has no practice task"
    assert fit_to_environment(CONFIG, empty) == CONFIG


async def test_a_method_that_plays_in_rounds_needs_practice_tasks_where_nothing_else_plays(
    memory: Memory, tiny_base: Path
):
    await memory.policies.register_base(str(tiny_base))
    empty = replace(SEAMS, tasks=lambda environment, split, num_tasks, offset=0: [])
    config = CONFIG.model_copy(update={"practice_episodes": 0, "explore_episodes": 0, "methods": ["sft", "grpo"]})
    need, *_ = await surroundings(memory, config, empty)
    assert need.name == "practice tasks" and need.is_required and not need.is_met
    assert need.mend.endswith("leave out grpo, which plays them too")
    need, *_ = await surroundings(memory, fit_to_environment(config, SEAMS), SEAMS)
    assert need.detail.startswith("10 tasks of 'sums' are played in 2 rounds")
    need, *_ = await surroundings(memory, config.model_copy(update={"methods": ["sft", "dpo"]}), empty)
    assert need.name == "held-out tasks"


async def test_the_needs_say_how_few_tasks_are_used(memory: Memory, tiny_base: Path):
    await memory.policies.register_base(str(tiny_base))
    for wanted, expected in [
        (64, "10 tasks of 'sums' are played in 5 rounds, and 0 are left to choose a checkpoint by"),
        (4, "4 tasks of 'sums' are played in 10 rounds, and 6 are left to choose a checkpoint by"),
    ]:
        config = fit_to_environment(CONFIG.model_copy(update={"num_practice_tasks": wanted}), SEAMS)
        need, *_ = await surroundings(memory, config, SEAMS)
        assert need.detail == expected
