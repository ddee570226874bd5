"""Fixtures of the API tests: one server for a module's tests, or one for each test that breaks things."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.runtime.api.playing import FORGETFUL, PlayedWorld
from tests.runtime.api.worlds import ServedWorld


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlayedWorld]:
    """A server on a fake engine for a module's tests; each test resets it."""
    with PlayedWorld(tmp_path_factory.mktemp("shared"), memory_config=FORGETFUL) as world:
        yield world


@pytest.fixture
def untouched(world: PlayedWorld, client: openai.OpenAI) -> Iterator[openai.OpenAI]:
    """A client; asserts that none of its requests opened a trajectory."""
    yield client
    assert world.num_trajectories == 0


@pytest.fixture
def http(world: ServedWorld) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=world.url, trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def client(world: ServedWorld) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        yield client
