"""ScienceWorld on its real simulator, if the extra and Java are installed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator

import pytest

from memory.schema import Split
from runtime.environments.science_world import ScienceWorld
from runtime.errors import EnvironmentRefused, ToolError, UnknownTask
from runtime.tools.base import run_tool

pytest.importorskip("scienceworld", reason="the extra 'scienceworld' is not installed")
if shutil.which("java") is None:
    pytest.skip("no 'java' on the PATH", allow_module_level=True)
# The package leaves its temporary directory and its pipes to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def world() -> Iterator[ScienceWorld]:
    world = ScienceWorld(["boil", "find-animal"], num_worlds=2)
    yield world
    for simulator in world._free:
        if simulator is not None:
            simulator.kill()


def test_the_published_sets_are_practice_held_out_and_sealed(world: ScienceWorld):
    assert [task.name for task in world.tasks(Split.PRACTICE, 3)] == ["boil-0", "find-animal-0", "boil-1"]
    sides = [world.tasks(Split.PRACTICE, 999), world.tasks(Split.HELD_OUT, 999), world.sealed_tasks(999)]
    assert [len(side) for side in sides] == [14 + 150, 7 + 75, 9 + 75]
    assert len({task.name for side in sides for task in side}) == 330
    assert {task.split for task in sides[2]} == {Split.HELD_OUT}
    assert [[world.is_sealed(task.name) for task in side].count(True) for side in sides] == [0, 0, 84]
    for name in ("boil-30", "boil-03", "melt-0", "boil"):
        with pytest.raises(UnknownTask, match="such as 'boil-3'"):
            world.task(name)


async def test_the_games_own_solution_wins_and_is_a_demonstration(world: ScienceWorld):
    task = world.task("find-animal-0")
    messages = await world.demonstrate(task)
    assert messages is not None and [message["role"] for message in messages[:3]] == ["user", "assistant", "tool"]
    calls = [message["tool_calls"][0]["function"] for message in messages if message["role"] == "assistant"]
    playthrough = await world.start(task)
    assert playthrough.task_text == messages[0]["content"]
    for function in calls:
        await run_tool(playthrough.tools[0], function["arguments"])
    assert playthrough.is_done and (await playthrough.close()).value == 1.0
    assert await world.demonstrate(world.tasks(Split.HELD_OUT, 1)[0]) is None


async def test_episodes_beside_each_other_have_worlds_of_their_own(world: ScienceWorld):
    first, second = await asyncio.gather(*(world.start(world.task("boil-0")) for _ in range(2)))
    await run_tool(first.tools[0], json.dumps({"command": "open door to kitchen"}))
    await run_tool(first.tools[0], json.dumps({"command": "go to kitchen"}))
    seen = [(await run_tool(it.tools[0], json.dumps({"command": "look around"}))).content for it in (first, second)]
    assert "called the kitchen" in seen[0] and "called the kitchen" not in seen[1]
    assert [(await it.close()).value < 1.0 for it in (first, second)] == [True, True]


async def test_a_simulator_that_dies_fails_its_episode_and_is_replaced(world: ScienceWorld):
    playthrough = await world.start(world.task("boil-1"))
    playthrough._simulator.kill()
    result = await run_tool(playthrough.tools[0], json.dumps({"command": "look around"}))
    assert result.error is not None and result.error.startswith("the world broke")
    with pytest.raises(ToolError, match="the episode has no score"):
        await playthrough.close()
    again = await world.start(world.task("boil-1"))
    assert "This room is called" in (await run_tool(again.tools[0], json.dumps({"command": "look around"}))).content
    await again.close()


def test_a_kind_that_does_not_exist_is_named():
    with pytest.raises(EnvironmentRefused, match="scienceworld has no kind 'cook'; there is: boil, "):
        ScienceWorld(["cook"])
