"""A data directory has one owner, even if it hangs, and none once that process is dead."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from memory.errors import DataDirectoryInUse
from memory.store import Memory
from tests.faults.support.children import Child, Tell
from tests.memory.episodes import PATIENT, HashingEncoder

WITHIN_SECONDS = 1.0  # the limit for refusing a second server


def own(tell: Tell, data_dir: Path, seconds: float) -> None:
    """Open the memory and keep it open, or report its owner and the seconds until the refusal."""
    began_at = time.monotonic()
    try:
        with Memory.open(data_dir, PATIENT, encoder=HashingEncoder()):
            tell("owns", os.getpid())
            time.sleep(seconds)
    except DataDirectoryInUse as error:
        tell("refused", time.monotonic() - began_at, str(error))


def test_a_hanging_owner_is_named_at_once_and_a_dead_one_is_succeeded(tmp_path: Path):
    first = Child(own, tmp_path, 60.0)
    first.listen(until=lambda: bool(first.told))
    os.kill(first.pid, signal.SIGSTOP)
    second = Child(own, tmp_path, 0.0)
    assert second.join() == 0
    ((kind, seconds, message),) = second.told
    assert kind == "refused" and seconds < WITHIN_SECONDS
    assert f"is in use by process {first.pid} since" in message and str(tmp_path) in message
    first.kill()
    third = Child(own, tmp_path, 0.0)
    assert third.join() == 0 and third.told == [("owns", third.pid)]


def test_of_many_that_start_at_once_one_wins(tmp_path: Path):
    children = [Child(own, tmp_path, 60.0) for _ in range(6)]
    for child in children:
        child.listen(until=lambda child=child: bool(child.told))
    for child in children:
        child.kill()
    (owner,) = [child.pid for child in children if child.told[0][0] == "owns"]
    refusals = [child.told[0][2] for child in children if child.told[0][0] == "refused"]
    assert len(refusals) == 5 and all(f"process {owner} since" in message for message in refusals)
