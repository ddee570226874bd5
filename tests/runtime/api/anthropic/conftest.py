"""The official client of Anthropic's API, against each test's server."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest

from tests.runtime.api.worlds import ServedWorld


@pytest.fixture
def claude(world: ServedWorld) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=world.url, api_key="none", max_retries=0) as client:
        yield client
