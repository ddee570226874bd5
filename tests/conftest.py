"""How the tests are dealt out to two workers: a file that starts an engine goes to one of them whole, and first."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    with_engine = {item.path for item in items if item.get_closest_marker("engine")}
    for item in items:
        if item.path in with_engine:
            item.add_marker(pytest.mark.xdist_group(str(item.path.stem)))
    items.sort(key=lambda item: item.path not in with_engine)
