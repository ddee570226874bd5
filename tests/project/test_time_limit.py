"""A test that hangs ends after its time limit, in whatever way it hangs, and the rest of the suite still runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANGING = """
import asyncio
import contextlib
import threading


async def test_a_task_that_does_not_let_itself_be_cancelled():
    async def live_on():
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)

    asyncio.create_task(live_on())
    await asyncio.sleep(0)


def test_a_lock_that_nobody_gives_back():
    lock = threading.Lock()
    with lock:
        lock.acquire()


def test_another():
    pass
"""


def test_what_hangs_is_ended_by_name_and_the_others_are_run(tmp_path: Path):
    (tmp_path / "test_hanging.py").write_text(HANGING)
    options = f"-c pyproject.toml --rootdir {tmp_path} -p tests.conftest -p no:cacheprovider -v -n 1 --dist loadfile"
    limits = ["-o", "timeout=2", "-o", "faulthandler_timeout=1"]
    command = [sys.executable, "-m", "pytest", *options.split(), *limits]
    run = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "2 failed, 2 passed" in run.stdout  # the first passed, then hung in teardown
    assert "::test_another" in run.stdout
    for name in ("test_a_task_that_does_not_let_itself_be_cancelled", "test_a_lock_that_nobody_gives_back"):
        assert f"crashed while running 'test_hanging.py::{name}'" in run.stdout
    assert "in test_a_lock_that_nobody_gives_back" in run.stderr  # its stack
