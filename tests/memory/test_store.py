"""Opening and closing a data directory, with one owner at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memory.config import MemoryConfig
from memory.errors import DataDirectoryInUse, StorageError
from memory.store import Memory
from tests.memory.episodes import HashingEncoder, add, play

ROOT = Path(__file__).parents[2]
SECOND_OWNER = """
import sys, time
from pathlib import Path
from memory.errors import DataDirectoryInUse
from memory.storage.ownership import take_ownership
began = time.monotonic()
try:
    take_ownership(Path(sys.argv[1]))
except DataDirectoryInUse as error:
    print(time.monotonic() - began, error, sep="\\n")
"""


def test_a_second_process_is_refused_at_once_by_one_line_that_names_the_first(memory: Memory):
    answer = subprocess.run(
        [sys.executable, "-c", SECOND_OWNER, str(memory.data_dir)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, *lines = answer.stdout.splitlines()
    assert float(seconds) < 1 and len(lines) == 1
    assert f"process {os.getpid()} since 2" in lines[0] and str(memory.data_dir) in lines[0]


def test_a_second_owner_in_the_same_process_is_refused_too(memory: Memory):
    began = time.monotonic()
    with pytest.raises(DataDirectoryInUse, match="stop it, or choose another directory"):
        Memory.open(memory.data_dir, encoder=HashingEncoder())
    assert time.monotonic() - began < 1


async def test_everything_is_there_when_it_is_opened_again(tmp_path: Path, config: MemoryConfig):
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        trajectory = await play(memory, "look", task="t1")
        await memory.insights.apply([add("fry on the stove")])
        cycle = await memory.cycles.open({"a": 1})
    with Memory.open(tmp_path, config, encoder=HashingEncoder()) as memory:
        assert memory.trajectories.get(trajectory.id) == trajectory
        assert len(memory.trajectories.steps(trajectory.id)) == 2
        assert memory.policies.active().version == 0 and memory.cycles.unfinished() == cycle
        assert memory.insights.active()[0].text == "fry on the stove"
        assert memory.database.check() == []
    assert {path.name for path in tmp_path.iterdir()} >= {"words.db" if config.database else "ratchet.db", "owner.lock"}


def test_a_failed_opening_gives_the_directory_up(tmp_path: Path):
    (tmp_path / "ratchet.db").write_bytes(b"not a database " * 100)
    with pytest.raises(StorageError):
        Memory.open(tmp_path, encoder=HashingEncoder())
    (tmp_path / "ratchet.db").unlink()
    Memory.open(tmp_path, encoder=HashingEncoder()).close()


def test_a_path_that_cannot_be_a_directory_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*choose another"):
        Memory.open(tmp_path / "file", encoder=HashingEncoder())


def test_closing_twice_is_harmless_and_unknown_settings_fail(memory: Memory):
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        MemoryConfig(encoders="x")
