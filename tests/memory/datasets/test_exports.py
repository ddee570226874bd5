"""Exports: their content, their tenant, and the memory that they need."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

from memory.datasets.examples import Origin
from memory.datasets.exports import ExportContent, ExportQuery
from memory.formats.content import ExampleContent, is_trained
from memory.schema import Feedback, Split, TrajectoryStage, Trust, now
from memory.store import Memory
from tests.memory.datasets.bulk import STEPS_PER_EPISODE, store_episodes
from tests.memory.episodes import play
from tests.memory.formats.rows import DEMONSTRATION, LABEL, PLAIN, PREFERENCE, REWARDED

OPENING = [{"role": "system", "content": "You cook."}, {"role": "user", "content": "Make a meal."}]


def export(memory: Memory, content: str, after: str = "", **fields) -> list[ExampleContent]:
    query = ExportQuery(ExportContent(content), **fields)
    return [it for page in memory.exports.read(query, after=after) for row in page for it in row.contents]


def commands(content: ExampleContent) -> list[str]:
    return [call["function"]["arguments"] for m in content.completion for call in m.get("tool_calls", ())]


async def test_trajectories_are_exported_with_their_rewards(memory: Memory):
    await play(memory, "fry", "eat", opening=OPENING, task="t1", tools=[{"function": {"name": "act"}}])
    await play(memory, "burn", opening=OPENING, reward=0.0, task="t2", split=Split.HELD_OUT)
    won, lost = export(memory, "trajectories")
    assert won.prompt == OPENING and [m["role"] for m in won.completion] == ["assistant", "tool"] * 2
    assert (won.reward, won.task, won.tools) == (1.0, "t1", [{"function": {"name": "act"}}])
    assert (lost.reward, lost.extra["split"], lost.extra["policy"]) == (0.0, "held-out", "v0")


async def test_demonstrations_are_successes_that_may_teach_and_imports(memory: Memory):
    await play(memory, "fry", opening=OPENING)
    await play(memory, "burn", opening=OPENING, reward=0.0)
    await play(memory, "peek", opening=OPENING, split=Split.HELD_OUT)
    await play(memory, "believe a page", opening=OPENING, trust=Trust.UNTRUSTED)
    await play(memory, "stop", opening=OPENING, stage=TrajectoryStage.FAILED)
    await memory.examples.add([PLAIN, PREFERENCE, REWARDED], Origin())
    await memory.examples.add([DEMONSTRATION], Origin(trust=Trust.UNTRUSTED))
    first, second = export(memory, "demonstrations")
    assert commands(first) == ['{"command": "fry"}'] and second == PLAIN


@pytest.mark.parametrize(
    ("fields", "may_teach"),
    [
        ({}, True),
        ({"trust": Trust.UNTRUSTED}, False),
        ({"trust": Trust.UNTRUSTED, "approved_at": now()}, True),
        ({"trust": Trust.UNTRUSTED, "approved_at": now(), "exemplar_text": "Fry it."}, False),
        ({"exemplar_text": "Fry it."}, True),
    ],
)
async def test_an_episode_is_exported_as_a_demonstration_where_it_may_teach(memory: Memory, fields, may_teach):
    played = await play(memory, "fry", opening=OPENING, **fields)

    assert memory.trajectories.get(played.id).may_teach is may_teach
    assert len(export(memory, "demonstrations")) == may_teach


async def test_what_clients_hold_out_by_name_or_by_text_is_exported_as_trajectories_alone(memory: Memory):
    live = {"environment": None, "opening": OPENING}
    await play(memory, "peek", task="measured", task_text="Is it done?", split=Split.HELD_OUT, **live)
    for fields in ({"task": "measured", "task_text": "Otherwise asked."}, {"task_text": " Is it\ndone? "}):
        await play(memory, "fry", **live, **fields)
        await play(memory, "burn", reward=0.0, **live, **fields)
    won = await play(memory, "fry", "eat", task="free", task_text="Make a meal.", **live)
    await play(memory, "burn", reward=0.0, task="free", task_text="Is it done?", **live)
    await play(memory, "fry", task="measured", task_text="Is it done?", tenant="shop", **live)
    asked = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]
    asked.append({"role": "user", "content": "Is it done?"})
    await memory.examples.add([PLAIN, replace(DEMONSTRATION, task="measured"), replace(PLAIN, prompt=asked)], Origin())
    await memory.examples.add([replace(LABEL, prompt=asked), replace(PREFERENCE, prompt=asked)], Origin())
    await memory.examples.add([replace(PLAIN, prompt=asked)], Origin(environment="kitchen"))
    assert len(export(memory, "trajectories")) == 7
    first, *imported = export(memory, "demonstrations")
    assert commands(first) == ['{"command": "fry"}', '{"command": "eat"}'] and first.task == won.task
    assert imported == [PLAIN, replace(PLAIN, prompt=asked)]  # a client's held-out tasks do not affect an environment
    assert [label.task for label in export(memory, "labels")] == ["free"] and export(memory, "preferences") == []
    assert len(export(memory, "demonstrations", tenant="shop")) == 1


async def test_a_correction_is_a_demonstration_and_a_preference_instead_of_the_success(memory: Memory):
    trajectory = await play(memory, "fry", "eat", opening=OPENING)
    await memory.feedback.post(Feedback(id="", trajectory_id=trajectory.id, correction="Done."))
    (demonstration,) = export(memory, "demonstrations")
    (preference,) = export(memory, "preferences")
    for each in (demonstration, preference):
        assert [m["content"] for m in each.completion] == ["Done."]
        assert len(each.prompt) == len(OPENING) + 2
    assert '"eat"' in preference.rejected[0]["tool_calls"][0]["function"]["arguments"]
    assert [label.is_good for label in export(memory, "labels")] == [False]


async def test_a_win_and_a_loss_of_one_task_are_a_preference_from_where_they_part(memory: Memory):
    await play(memory, "open fridge", "burn", opening=OPENING, task="t1", reward=0.0)
    await play(memory, "open fridge", "fry", "eat", opening=OPENING, task="t1")
    await play(memory, "open fridge", "fry", opening=OPENING, task="t2")
    (pair,) = export(memory, "preferences")
    assert len(pair.prompt) == len(OPENING) + 2 and len(pair.completion) == 4 and len(pair.rejected) == 2
    assert commands(pair)[0] == '{"command": "fry"}'


async def test_labels_are_rewarded_episodes_and_imported_ones(memory: Memory):
    for reward in (1.0, 0.0, None):
        await play(memory, "fry", opening=OPENING, reward=reward)
    await memory.examples.add([LABEL], Origin(environment="kitchen"))
    assert [it.is_good for it in export(memory, "labels")] == [True, False, False]
    assert len(export(memory, "labels", with_episodes=False)) == 1
    assert len(export(memory, "labels", with_examples=False)) == 2
    assert export(memory, "labels", environment="garden") == []


async def test_nothing_of_another_tenant_is_exported(memory: Memory):
    await play(memory, "fry", opening=OPENING, tenant="shop", task="t1")
    await play(memory, "burn", opening=OPENING, task="t1", reward=0.0)
    await memory.examples.add([PLAIN, PREFERENCE, LABEL], Origin(tenant="shop"))
    assert [len(export(memory, each, tenant="")) for each in ExportContent] == [1, 0, 0, 1]
    assert [len(export(memory, each, tenant="shop")) for each in ExportContent] == [1, 2, 1, 2]
    assert [memory.exports.count(ExportQuery(each, tenant="shop")) for each in ExportContent] == [1, 2, 2, 2]


async def test_an_export_goes_on_behind_any_of_its_cursors(memory: Memory):
    await store_episodes(memory.database, 70)
    await memory.examples.add([PLAIN, DEMONSTRATION], Origin(environment="kitchen"))
    query = ExportQuery(ExportContent.DEMONSTRATIONS)
    rows = [row for page in memory.exports.read(query) for row in page]
    assert len(rows) == len({row.cursor for row in rows}) == memory.exports.count(query) == 72
    for stop in (0, 31, 32, 69, 70, 71):
        cursor = rows[stop].cursor
        rest = [row.cursor for page in memory.exports.read(query, after=cursor) for row in page]
        assert rest == [row.cursor for row in rows[stop + 1 :]]
        assert memory.exports.count(query, after=cursor) == len(rest)
    with pytest.raises(ValueError, match="no cursor 'yesterday'"):
        next(memory.exports.read(query, after="yesterday"))


async def test_an_export_needs_the_memory_of_a_page_however_long_it_is(memory: Memory):
    async def peak_of(tenant: str, num_steps: int) -> int:
        await store_episodes(memory.database, num_steps // STEPS_PER_EPISODE, tenant=tenant)
        query = ExportQuery(ExportContent.DEMONSTRATIONS, tenant)
        next(memory.exports.read(query))  # warm-up: compiles the statements
        tracemalloc.start()
        num_trained = sum(
            sum(map(is_trained, content.completion))
            for page in memory.exports.read(query)
            for row in page
            for content in row.contents
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num_trained == num_steps // 2
        return peak

    assert await peak_of("large", 20_000) < 1.3 * await peak_of("small", 2_000)
