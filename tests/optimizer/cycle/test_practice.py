"""The insights that a cycle writes from its pool, and their scopes."""

from __future__ import annotations

from typing import Any

from memory.schema import Feedback
from memory.store import Memory
from optimizer.cycle.practice import learn_insights
from optimizer.errors import CompletionError
from tests.memory.episodes import HashingEncoder, play
from tests.optimizer.one_cycle import OneCycle

MARKS = {"": "ours", "acme": "theirs"}


async def test_lessons_are_drawn_from_each_tenants_own_episodes(tmp_path) -> None:
    read: list[str] = []

    async def complete(messages: list[dict[str, Any]], **_: Any) -> str:
        read.append(messages[-1]["content"])
        return f"ADD: {' and '.join(mark for mark in MARKS.values() if mark in read[-1])} taught this"

    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        for tenant, mark in MARKS.items():
            await play(memory, task="t1", task_text=f"fry what is {mark}", tenant=tenant)
        await learn_insights(OneCycle(memory, complete))
        for tenant, mark in MARKS.items():
            assert [insight.text for insight in memory.insights.active(tenant=tenant)] == [f"{mark} taught this"]
    assert len(read) == 2


async def test_rounds_and_cycles_over_the_same_episodes_confirm_a_lesson_once(tmp_path) -> None:
    read: list[str] = []

    async def complete(messages: list[dict[str, Any]], **_: Any) -> str:
        read.append(messages[-1]["content"])
        return "AGREE 1" if "1. Taste it" in read[-1] else "ADD: Taste it before you serve."

    def strength(memory: Memory) -> int:
        (insight,) = memory.insights.active()
        return insight.strength

    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        episode = await play(memory, task="t1")
        await memory.feedback.post(Feedback(trajectory_id=episode.id, value=True, comment="a bit bland"))
        first, second = OneCycle(memory, complete), OneCycle(memory, complete)
        for cycle in (first, first, second):
            await learn_insights(cycle)
        assert (len(read), strength(memory)) == (1, 2)
        assert "a bit bland" in read[0]
        await play(memory, task="t1")
        await learn_insights(second)
        assert (len(read), strength(memory)) == (2, 3)
        assert second.artifacts.critiques.num_asked == 1


async def test_counting_the_same_episodes_again_makes_no_lesson_stronger(tmp_path) -> None:
    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        for number in range(24):
            food, is_won = f"food{number % 6}", number % 2 == 0
            act = f"cook {food} with {'stove' if is_won else 'oven'}"
            await play(memory, act, task=str(number), task_text=f"fry the {food}", reward=float(is_won))
        cycle = OneCycle(memory, None)
        await learn_insights(cycle)
        before = [(insight.text, insight.strength) for insight in memory.insights.active()]
        for _ in range(3):
            await learn_insights(cycle)
        assert before and [(insight.text, insight.strength) for insight in memory.insights.active()] == before


async def test_a_critic_that_is_away_leaves_a_count_and_a_reason(tmp_path) -> None:
    async def complete(messages: list[dict[str, Any]], **_: Any) -> str:
        raise CompletionError("the engine is gone")

    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        await play(memory, task="t1")
        cycle = OneCycle(memory, complete, CompletionError("the engine is gone"))
        for _ in range(2):
            await learn_insights(cycle)
        assert memory.insights.active() == []
        assert memory.insights.read_evidence() == set()
    assert cycle.artifacts.critiques.model_dump() == {
        "num_asked": 2,
        "num_failed": 2,
        "num_skipped": 0,
        "first_failure": "CompletionError: the engine is gone",
    }


async def test_lessons_from_live_text_are_drawn_from_one_persons_episodes_and_are_theirs(tmp_path) -> None:
    read: list[str] = []

    async def complete(messages: list[dict[str, Any]], **_: Any) -> str:
        read.append(messages[-1]["content"])
        told = [mark for mark in ("jane", "bob", "shared", "nobody") if mark in read[-1]]
        return f"ADD: You should ask {' and '.join(told)}"

    lived = [{"user_id": "jane"}, {"user_id": "bob"}, {"user_id": "bob", "is_shared": True}, {}]
    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        for mark, whose in zip(("jane", "bob", "shared", "nobody"), lived, strict=True):
            await play(memory, environment=None, kind="chat", task_text=f"words of {mark}", **whose)
        await learn_insights(OneCycle(memory, complete))
        made = {(it.user_id, it.is_shared, it.text) for it in memory.insights.active()}
        assert made == {
            ("jane", False, "You should ask jane"),
            ("bob", False, "You should ask bob"),
            ("", True, "You should ask shared"),
        }
        assert [it.text for it in memory.insights.active("", scope="")] == [
            "You should ask shared"
        ]  # those that a report may list
