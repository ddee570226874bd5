"""Calls that prepare tasks: a few at a time for each key and tenant, cancelled if the client disconnects."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from runtime.api.gateway.preparation_limit import MAX_PER_KEY, MAX_PER_TENANT
from tests.runtime.api.worlds import Doors, ServedWorld
from tests.support.waiting import eventually


class SlowDoors(Doors):
    """Doors whose preparation ends when the test releases it."""

    def __init__(self) -> None:
        self.is_ready = threading.Event()
        self.num_under_way = 0
        self.num_cancelled = 0

    def has_under_way(self, num: int) -> bool:
        return self.num_under_way == num

    async def prepare(self, tasks: Sequence, on_progress=None) -> None:
        self.num_under_way += 1
        try:
            while not self.is_ready.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_under_way -= 1


@pytest.fixture
def doors(world: ServedWorld) -> Iterator[SlowDoors]:
    doors = SlowDoors()
    world.services.environments["doors"] = doors
    yield doors
    doors.is_ready.set()


def prepare(world: ServedWorld, key: str | None = None, timeout: float = 60) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=world.url, trust_env=False, timeout=timeout, headers=headers) as http:
        return http.post("/v1/environments/doors/prepare", json={"tasks": ["1", "2"]})


def make_key(world: ServedWorld, tenant: str) -> str:
    return asyncio.run(world.memory.keys.create("player", ["infer"], tenant=tenant))[1]


def test_a_key_has_few_calls_under_way_and_a_tenant_a_few_more(world: ServedWorld, doors: SlowDoors):
    keys = [make_key(world, "acme") for _ in range(3)]
    other = make_key(world, "beta")
    with ThreadPoolExecutor(16) as pool:
        held = []
        for key in keys[:2]:
            held += [pool.submit(prepare, world, key) for _ in range(MAX_PER_KEY)]
            assert eventually(partial(doors.has_under_way, len(held)))
            refused = prepare(world, key)
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert len(held) == MAX_PER_TENANT
        assert prepare(world, keys[2]).status_code == 429  # the tenant's limit is reached
        theirs = pool.submit(prepare, world, other)
        assert eventually(lambda: doors.num_under_way == MAX_PER_TENANT + 1)
        doors.is_ready.set()
        assert [each.result().status_code for each in [*held, theirs]] == [200] * (MAX_PER_TENANT + 1)
    assert prepare(world, keys[2]).json() == {"num_tasks": 2}


def test_a_client_that_leaves_ends_its_call_and_frees_its_place(world: ServedWorld, doors: SlowDoors):
    for number in range(2 * MAX_PER_KEY):
        with pytest.raises(httpx.ReadTimeout):
            prepare(world, timeout=0.5)
        assert eventually(lambda number=number: doors.num_cancelled == number + 1)
    assert doors.num_under_way == 0


def test_a_call_cannot_ask_for_any_number_of_games(world: ServedWorld, tmp_path: Path):
    with httpx.Client(base_url=world.url, trust_env=False, timeout=20) as http:
        names = {"tasks": [str(number) for number in range(1_001)]}
        assert http.post("/v1/environments/doors/prepare", json=names).status_code == 400
