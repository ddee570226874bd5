"""Places for turns: all of them for a tenant alone, a share for each of several."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack

import pytest

from runtime.api.errors import Overloaded
from runtime.api.gateway.admission import ACTIVE_SECONDS, ConcurrencyLimit
from runtime.api.gateway.request_body import BodyBudget


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.moment = 0.0

    def __call__(self) -> float:
        return self.moment


def fill(room: ConcurrencyLimit, tenant: str, held: ExitStack) -> int:
    """Take places until there are no more for this tenant; return how many."""
    num = 0
    with contextlib.suppress(Overloaded):
        while True:
            room.require(tenant)
            held.enter_context(room.occupy(tenant))
            num += 1
    return num


def test_a_tenant_alone_has_every_place() -> None:
    with ExitStack() as held:
        assert fill(ConcurrencyLimit(16), "a", held) == 16


def test_a_tenant_that_takes_all_it_gets_leaves_room_for_the_others() -> None:
    room = ConcurrencyLimit(16)
    room.require("b")  # which comes again later
    with ExitStack() as held:
        assert (fill(room, "a", held), fill(room, "b", held)) == (14, 2)


def test_places_that_become_free_go_to_a_tenant_that_has_less_than_its_share() -> None:
    room = ConcurrencyLimit(16)
    with ExitStack() as first, ExitStack() as later:
        assert fill(room, "a", first) == 16
        assert fill(room, "b", later) == 0  # it was turned away, and so waits
        first.close()
        assert (fill(room, "b", later), fill(room, "a", later)) == (14, 2)


def test_a_tenant_that_asks_no_more_has_no_share() -> None:
    clock = Clock()
    room, held = ConcurrencyLimit(2, clock), ExitStack()
    room.require("b")
    clock.moment += ACTIVE_SECONDS + 1
    assert fill(room, "a", held) == 2
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
