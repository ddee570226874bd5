"""Slots for turns: all of them for a single tenant, a share for each of several."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack

import pytest

from runtime.api.errors import Overloaded
from runtime.api.gateway.admission import ACTIVE_SECONDS, ConcurrencyLimit
from runtime.api.gateway.request_body import BodyBudget


class Clock:
    """A clock that advances only when set."""

    def __init__(self) -> None:
        self.moment = 0.0

    def __call__(self) -> float:
        return self.moment


def fill(limit: ConcurrencyLimit, tenant: str, held: ExitStack) -> int:
    """Occupy slots until this tenant gets no more; return the number."""
    num = 0
    with contextlib.suppress(Overloaded):
        while True:
            limit.require(tenant)
            held.enter_context(limit.occupy(tenant))
            num += 1
    return num


def test_a_tenant_alone_has_every_slot() -> None:
    with ExitStack() as held:
        assert fill(ConcurrencyLimit(16), "a", held) == 16


def test_a_tenant_that_takes_all_it_gets_leaves_slots_for_the_others() -> None:
    limit = ConcurrencyLimit(16)
    limit.require("b")  # it returns later
    with ExitStack() as held:
        assert (fill(limit, "a", held), fill(limit, "b", held)) == (14, 2)


def test_slots_that_become_free_go_to_a_tenant_that_has_less_than_its_share() -> None:
    limit = ConcurrencyLimit(16)
    with ExitStack() as first, ExitStack() as later:
        assert fill(limit, "a", first) == 16
        assert fill(limit, "b", later) == 0  # it was rejected, and so counts as waiting
        first.close()
        assert (fill(limit, "b", later), fill(limit, "a", later)) == (14, 2)


def test_a_tenant_that_asks_no_more_has_no_share() -> None:
    clock = Clock()
    limit, held = ConcurrencyLimit(2, clock), ExitStack()
    limit.require("b")
    clock.moment += ACTIVE_SECONDS + 1
    assert fill(limit, "a", held) == 2
    held.close()


def test_a_tenant_has_half_of_the_memory_for_bodies_and_gives_it_back() -> None:
    budget = BodyBudget(100)
    with budget.open("a") as ours, budget.open("b") as theirs:
        ours.add(50)
        with pytest.raises(Overloaded):
            ours.add(1)
        theirs.add(50)
    with budget.open("a") as ours, budget.open("a") as again:
        ours.add(25)
        again.add(25)
