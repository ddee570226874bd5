"""SIGKILL at any moment: every acknowledged write is stored, once, and whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from memory.store import Memory
from tests.faults.support.children import Child
from tests.faults.support.records import check_records
from tests.faults.support.worlds import play_until_killed
from tests.memory.episodes import PATIENT, HashingEncoder


def kill_at_random(data_dir: Path, number: int) -> list[tuple]:
    """Let a child play, and kill it at a random moment, sometimes while it boots; return its messages."""
    dice = random.Random(number)
    child = Child(play_until_killed, data_dir, f"kill-{number}")
    if dice.random() < 0.2:
        child.listen(seconds=dice.uniform(0, 0.5))
    else:
        num_told = dice.randint(1, 300)
        child.listen(until=lambda: len(child.told) >= num_told)
        child.listen(seconds=dice.uniform(0, 0.02))  # without it, every kill would follow an acknowledgement at once
    child.kill()
    return child.told


def kill_again_and_again(data_dir: Path, numbers: range) -> int:
    """Kill and boot on the same data repeatedly, then check the data. Return the number of messages."""
    told = [words for number in numbers for words in kill_at_random(data_dir, number)]
    assert all(problems == [] for kind, problems, *_ in told if kind == "booted")
    with Memory.open(data_dir, PATIENT, encoder=HashingEncoder()) as memory:
        assert memory.database.check() == []
    check_records(data_dir / "ratchet.db", [words for words in told if words[0] != "booted"])
    return len(told)


def test_what_was_acknowledged_under_64_episodes_survives_a_few_kills(tmp_path: Path):
    assert kill_again_and_again(tmp_path / "data", range(5)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_what_was_acknowledged_under_64_episodes_survives_a_thousand_kills(tmp_path: Path, hundred: int):
    assert kill_again_and_again(tmp_path / "data", range(100 * hundred, 100 * (hundred + 1))) > 5_000
