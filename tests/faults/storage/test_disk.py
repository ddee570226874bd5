"""A full, failing or read-only disk, and no free descriptors: a typed error, then everything works again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memory.errors import StorageError
from memory.schema import TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from tests.faults.support.children import Child, Tell
from tests.faults.support.disks import fill, make_read_only, mount_disk
from tests.faults.support.records import check_records
from tests.faults.support.worlds import play_one, playing
from tests.memory.episodes import PATIENT, HashingEncoder

DISK_BYTES = 24 * 2**20
NUM_AT_ONCE = 64
TYPED = ("StorageError", "PolicyError", "EngineError", "EngineLost")
Fault = Callable[[Path], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def full_disk(data_dir: Path) -> Iterator[None]:
    filler = fill(data_dir)
    yield
    filler.unlink()


@contextlib.contextmanager
def failing_writes(data_dir: Path) -> Iterator[None]:
    """Make the kernel refuse writes that grow the log: SQLite reports a disk I/O error."""
    size = max(path.stat().st_size for path in data_dir.glob("ratchet.db*"))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def no_descriptors(data_dir: Path) -> Iterator[None]:
    """Limit this process to 64 descriptors, with few of them free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    num_open = len(os.listdir("/proc/self/fd"))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(60 - num_open)]
    yield
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def play_through(tell: Tell, data_dir: Path, fault: Fault) -> None:
    """Play before, during and after a fault, and report how each episode ended."""
    try:
        if fault is full_disk:
            mount_disk(data_dir, DISK_BYTES)
    except OSError as error:
        tell("skipped", f"no disk can be mounted here: {error}")
        return

    async def play(agent: Agent, name: str) -> None:
        try:
            ended = await play_one(agent, name)
            tell("ended", name.partition("-")[0], ended.stage, ended.error or "")
            if ended.stage is TrajectoryStage.FINISHED:
                tell("closed", name, ended.id)
        except Exception as error:
            tell("ended", name.partition("-")[0], None, f"{type(error).__name__}: {error}")

    async def run() -> None:
        with Memory.open(data_dir, PATIENT, encoder=HashingEncoder()) as memory:
            async with playing(lambda *words: None, memory) as agent:
                await asyncio.gather(*(play(agent, f"before-{number}") for number in range(4)))
                await memory.index.drain()  # opening the index raises the descriptor limit
                with fault(data_dir):
                    await asyncio.gather(*(play(agent, f"during-{number}") for number in range(NUM_AT_ONCE)))
                await asyncio.gather(*(play(agent, f"after-{number}") for number in range(4)))
            await memory.trajectories.close_orphans()
            tell("checked", memory.database.check())
        with Memory.open(data_dir, PATIENT, encoder=HashingEncoder()):
            closed = [words for words in told if words[0] == "closed"]
            check_records(data_dir / "ratchet.db", closed)
            tell("compared", len(closed))

    told: list[tuple] = []
    tell = _both(tell, told)
    asyncio.run(run())


def _both(tell: Tell, told: list[tuple]) -> Tell:
    def tell_and_keep(*words: object) -> None:
        told.append(words)
        tell(*words)

    return tell_and_keep


@pytest.mark.parametrize("fault", [full_disk, failing_writes, no_descriptors])
def test_what_fails_meanwhile_says_why_and_afterwards_all_is_well(tmp_path: Path, fault: Fault):
    child = Child(play_through, tmp_path, fault)
    assert child.join() == 0
    told = child.told
    if told[0][0] == "skipped":
        pytest.skip(told[0][1])
    ended = {
        when: [words[2:] for words in told if words[:2] == ("ended", when)] for when in ("before", "during", "after")
    }
    finished = (TrajectoryStage.FINISHED, "")
    assert (ended["before"], ended["after"]) == ([finished] * 4, [finished] * 4)
    errors = [error for stage, error in ended["during"] if (stage, error) != finished]
    # Without descriptors, an episode waits for another's connection and may finish; disk faults always fail.
    assert len(ended["during"]) == NUM_AT_ONCE and (errors or fault is no_descriptors)
    assert [error for error in errors if not error.startswith(TYPED)] == []
    assert ("checked", []) in told and told[-1][0] == "compared" and told[-1][1] >= 8


def open_read_only(tell: Tell, data_dir: Path) -> None:
    """Open a memory, close it, and open it again on a read-only disk."""
    try:
        mount_disk(data_dir, DISK_BYTES)
    except OSError as error:
        tell("skipped", f"no disk can be mounted here: {error}")
        return
    Memory.open(data_dir, PATIENT, encoder=HashingEncoder()).close()
    make_read_only(data_dir)
    try:
        Memory.open(data_dir, PATIENT, encoder=HashingEncoder())
    except StorageError as error:
        tell("refused", str(error))


def test_a_read_only_directory_is_refused_by_name(tmp_path: Path):
    child = Child(open_read_only, tmp_path)
    assert child.join() == 0
    ((kind, message),) = child.told
    if kind == "skipped":
        pytest.skip(message)
    assert str(tmp_path) in message and "Read-only file system" in message
