"""Fuzzing by the OpenAPI page: no request, valid or invalid, makes the server fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from tests.runtime.api.playing import FORGETFUL, PlayedWorld
from tests.runtime.fake_engine import say

FAILURE = 500
NUM_PARTS = 8
PARTS = [slice(part, None, NUM_PARTS) for part in range(NUM_PARTS)]
"""The routes in parts; at the full count each takes minutes."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PlayedWorld]:
    with PlayedWorld(tmp_path / "data", say("hello"), memory_config=FORGETFUL) as world:
        yield world


@schemathesis.serializer("application/x-ndjson")
def write_lines(_context: Any, value: object) -> bytes:
    """Serialise a generated value as a body of lines."""
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def routes_of(page: dict[str, Any]) -> list[schemathesis.APIOperation]:
    """Return the routes of an OpenAPI page without their security, so that no case is spent on a missing key."""
    del page["components"]["securitySchemes"]
    for methods in page["paths"].values():
        for route in methods.values():
            del route["security"]
    return [found.ok() for found in schemathesis.openapi.from_dict(page).get_all_operations()]


@pytest.mark.parametrize(
    ("num_cases", "part"), [(3, slice(None)), *(pytest.param(450, part, marks=pytest.mark.slow) for part in PARTS)]
)
def test_no_request_of_the_page_or_beside_it_makes_the_server_fail(
    world: PlayedWorld, num_cases: int, part: slice
) -> None:
    """Each route gets `num_cases` requests that fit the page, and as many that do not."""
    _, key = asyncio.run(world.memory.keys.create("fuzzer", ["admin"]))
    headers = {"Authorization": f"Bearer {key}"}
    page = httpx.get(f"{world.url}/openapi.json", trust_env=False, timeout=60).json()
    statuses: Counter[int] = Counter()
    failed = []
    with requests.Session() as http:
        http.trust_env = False
        for operation in routes_of(page)[part]:
            can_be_wrong = bool(operation.body) or any(operation.iter_parameters())
            for mode in GenerationMode if can_be_wrong else [GenerationMode.POSITIVE]:

                @settings(
                    max_examples=num_cases,
                    deadline=None,
                    database=None,
                    derandomize=num_cases < 100,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def send(case: schemathesis.Case) -> None:
                    answer = case.call(base_url=world.url, session=http, headers=headers, timeout=30)
                    statuses[answer.status_code] += 1
                    if answer.status_code >= FAILURE:
                        failed.append((answer.status_code, answer.text[:300], case.as_curl_command()))

                with contextlib.suppress(Unsatisfiable):  # no invalid request exists
                    send()
    print(f"{statuses.total()} requests: {dict(sorted(statuses.items()))}")
    assert failed == []
