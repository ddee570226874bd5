"""Work in slices gives the same result, and leaves the event loop to others in between."""

from __future__ import annotations

import asyncio

import pytest

from memory import sliced_work
from memory.sliced_work import SlicedWork, run, run_in_slices


def count_up(last: int, done: list[int]) -> SlicedWork[str]:
    for number in range(last):
        done.append(number)
        yield
    return "done"


def test_work_done_at_once_returns_its_result():
    done: list[int] = []
    assert run(count_up(3, done)) == "done" and done == [0, 1, 2]


async def test_others_have_their_turn_after_every_slice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sliced_work, "SLICE_SECONDS", -1.0)
    done: list[int] = []
    working = asyncio.ensure_future(run_in_slices(count_up(100, done)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert 0 < len(done) < 20
    assert await working == "done" and len(done) == 100


async def test_short_work_does_not_wait_for_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sliced_work, "SLICE_SECONDS", 60.0)
    was_free = False

    async def other() -> None:
        nonlocal was_free
        was_free = True

    waiting = asyncio.ensure_future(other())
    assert await run_in_slices(count_up(100, [])) == "done"
    assert not was_free
    await waiting
