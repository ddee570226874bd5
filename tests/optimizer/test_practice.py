"""What practice puts into words, and whose words they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from memory.store import Memory
from optimizer.practice import learn_words
from optimizer.rewards import grade
from tests.memory.episodes import HashingEncoder, play

MARKS = {"": "ours", "acme": "theirs"}


async def test_lessons_are_drawn_from_each_tenants_own_episodes(tmp_path) -> None:
    read: list[str] = []

    async def complete(messages: list[dict[str, Any]]) -> str:
        read.append(messages[-1]["content"])
        return f"ADD: {' and '.join(mark for mark in MARKS.values() if mark in read[-1])} taught this"

    async def read_pool(**which: bool):
        return grade(memory)

    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        for tenant, mark in MARKS.items():
            await play(memory, task="t1", task_text=f"fry what is {mark}", tenant=tenant)
        seams, config = SimpleNamespace(complete=complete), SimpleNamespace(seed=0)
        await learn_words(SimpleNamespace(memory=memory, seams=seams, config=config, read_pool=read_pool))
        for tenant, mark in MARKS.items():
            assert [insight.text for insight in memory.insights.active(tenant=tenant)] == [f"{mark} taught this"]
    assert len(read) == 2
