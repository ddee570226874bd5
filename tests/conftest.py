"""The order of the tests, which workers take file by file: those that start an engine first, many short ones last,
so that all workers end at about the same time. And the handling of a test that hangs: its time limit, where that is
longer than in pyproject.toml, and that it is tried only once."""

from __future__ import annotations

import faulthandler
import logging
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from _pytest.faulthandler import fault_handler_stderr_fd_key
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from tests.runtime.api.worlds import ServedWorld

ENGINE_SECONDS = 1800
"""The limit includes the start of the module's engine, and a model's training."""
SLOW_SECONDS = 6 * 3600
STACKS_SHARE = 0.9
"""Share of a test's time limit after which all stacks are printed."""


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Restore logging after a command in the test's process, which redirects all logs to a file."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    opened = [it for it in root.handlers if isinstance(it, RotatingFileHandler) and it not in handlers]
    if opened:
        for handler in opened:
            handler.close()
        root.handlers, root.level = handlers, level
        structlog.reset_defaults()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ServedWorld]:
    """A server for one test, in a thread, with a scripted learner and a fresh data directory."""
    from tests.runtime.api.worlds import ServedWorld  # imported late: else every test waits for FastAPI

    with ServedWorld(tmp_path / "data") as world:
        yield world


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    with_engine = {item.path for item in items if item.get_closest_marker("engine")}
    last_first = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in reversed(items)))}
    items.sort(key=lambda item: (item.path not in with_engine, last_first[item.path]))
    for item in items:
        if item.get_closest_marker("timeout") is None:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
            elif item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.timeout(ENGINE_SECONDS))


class OnceEach(LoadFileScheduling):
    """Schedules by file, each test once: xdist gives a test whose worker died to the next, which then dies too."""

    def remove_node(self, node: Any) -> str | None:
        workload = self.assigned_work.get(node, {})
        ended = next((name for tests in workload.values() for name, is_done in tests.items() if not is_done), None)
        for file, tests in list(workload.items()):
            if ended in tests:
                tests[ended] = True
            if all(tests.values()):
                del workload[file]  # a worker with an empty file never requests more work
        super().remove_node(node)
        return ended


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Print all stacks shortly before a test's time limit: the output of pytest-timeout is lost in a worker."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getini("timeout"))
    # the real standard error; pytest has no public name for it
    faulthandler.dump_traceback_later(STACKS_SHARE * seconds, file=item.config.stash[fault_handler_stderr_fd_key])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OnceEach | None:
    return OnceEach(config, log) if config.getvalue("dist") == "loadfile" else None
