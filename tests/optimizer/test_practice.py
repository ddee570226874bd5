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

    async def read_pool():
        return grade(memory)

    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        for tenant, mark in MARKS.items():
            await play(memory, task="t1", task_text=f"fry what is {mark}", tenant=tenant)
        seams, config = SimpleNamespace(complete=complete), SimpleNamespace(seed=0)
        await learn_words(SimpleNamespace(memory=memory, seams=seams, config=config, read_pool=read_pool))
        for tenant, mark in MARKS.items():
            assert [insight.text for insight in memory.insights.active(tenant=tenant)] == [f"{mark} taught this"]
    assert len(read) == 2


async def test_lessons_from_live_text_are_drawn_from_one_persons_episodes_and_are_theirs(tmp_path) -> None:
    read: list[str] = []

    async def complete(messages: list[dict[str, Any]]) -> str:
        read.append(messages[-1]["content"])
        return f"ADD: {' and '.join(mark for mark in ('jane', 'bob', 'shared', 'nobody') if mark in read[-1])}"

    async def read_pool():
        return grade(memory)

    lived = [{"user_id": "jane"}, {"user_id": "bob"}, {"user_id": "bob", "is_shared": True}, {}]
    with Memory.open(tmp_path, encoder=HashingEncoder()) as memory:
        for mark, whose in zip(("jane", "bob", "shared", "nobody"), lived, strict=True):
            await play(memory, environment=None, kind="chat", task_text=f"words of {mark}", **whose)
        seams, config = SimpleNamespace(complete=complete), SimpleNamespace(seed=0)
        await learn_words(SimpleNamespace(memory=memory, seams=seams, config=config, read_pool=read_pool))
        made = {(it.user_id, it.is_shared, it.text) for it in memory.insights.active()}
        assert made == {("jane", False, "jane"), ("bob", False, "bob"), ("", True, "shared")}
        assert [it.text for it in memory.insights.active("", scope="")] == ["shared"]  # what a report may list
