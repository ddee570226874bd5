"""The order of the tests, which two workers take up file by file: those that start an engine first, many short ones
last, so that both end at about the same time."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    with_engine = {item.path for item in items if item.get_closest_marker("engine")}
    last_first = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in reversed(items)))}
    items.sort(key=lambda item: (item.path not in with_engine, last_first[item.path]))
