"""SIGKILL in the middle of everything: what was acknowledged is there, once, and whole."""

from __future__ import annotations

import random
import sqlite3
from array import array
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import pytest

from memory.store import Memory
from tests.faults.children import Child
from tests.faults.worlds import answer_of, expected_steps, play_until_killed
from tests.memory.episodes import PATIENT, HashingEncoder


def kill_at_random(data_dir: Path, number: int) -> list[tuple]:
    """Have a child play, kill it at a random moment, now and then while it boots; return what it told."""
    dice = random.Random(number)
    child = Child(play_until_killed, data_dir, f"kill-{number}")
    if dice.random() < 0.2:
        child.listen(seconds=dice.uniform(0, 0.5))
    else:
        num_told = dice.randint(1, 300)
        child.listen(until=lambda: len(child.told) >= num_told)
        child.listen(seconds=dice.uniform(0, 0.02))  # or else always right after an acknowledgement
    child.kill()
    return child.told


def kill_again_and_again(data_dir: Path, numbers: range) -> int:
    """Kill, boot on what is left, kill again; check what is there in the end. Return how much was acknowledged."""
    told = [words for number in numbers for words in kill_at_random(data_dir, number)]
    assert all(problems == [] for kind, problems, *_ in told if kind == "booted")
    with Memory.open(data_dir, PATIENT, encoder=HashingEncoder()) as memory:
        assert memory.database.check() == []
    check_records(data_dir / "ratchet.db", [words for words in told if words[0] != "booted"])
    return len(told)


def check_records(path: Path, told: list[tuple]) -> None:
    """Compare the rows with what was acknowledged, and each record with what an episode of its name must be."""
    ids, stages, answers, steps, rewards = read_rows(path)
    twice = {name for name, found in ids.items() if len(found) > 1}
    lost = []
    for kind, name, what in told:
        if kind == "stepped":
            is_there = name in ids and len(steps[ids[name][0]]) >= what
        elif kind == "closed":
            is_there = ids.get(name) == [what] and (stages[what], answers[what]) == ("finished", answer_of(name))
        else:
            is_there = rewards.get(what) == [name]
        if not is_there:
            lost.append((kind, name, what))
    torn = {
        name
        for name, (trajectory_id, *_) in ids.items()
        if not is_whole(expected_steps(name), steps[trajectory_id], is_closed=stages[trajectory_id] == "finished")
    }
    assert (lost, twice, torn) == ([], set(), set())


def read_rows(path: Path):
    """Read the rows past our own code: by name of the episode its ids; by id its stage, answer, steps, rewards."""
    ids, steps, rewards = defaultdict(list), defaultdict(list), defaultdict(list)
    stages, answers = {}, {}
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT id, task_text, stage, answer FROM trajectories"
        for trajectory_id, name, stage, answer in connection.execute(query):
            ids[name].append(trajectory_id)
            stages[trajectory_id], answers[trajectory_id] = stage, answer
        query = "SELECT trajectory_id, position, kind, content, output_token_ids FROM steps ORDER BY 1, 2"
        for trajectory_id, *step in connection.execute(query):
            steps[trajectory_id].append(tuple(step))
        for trajectory_id, reason in connection.execute("SELECT trajectory_id, reason FROM rewards"):
            rewards[trajectory_id].append(reason)
    return dict(ids), stages, answers, steps, rewards


def is_whole(expected: list[tuple], found: list[tuple], *, is_closed: bool) -> bool:
    """Return whether the steps are those expected, as far as they go; all of them where the episode was closed."""
    plain = [
        (position, kind, content, None if output_ids is None else array("I", output_ids).tobytes())
        for position, (kind, content, output_ids) in enumerate(expected)
    ]
    return found == (plain if is_closed else plain[: len(found)])


def test_what_was_acknowledged_under_64_episodes_survives_a_few_kills(tmp_path: Path):
    assert kill_again_and_again(tmp_path / "data", range(5)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_what_was_acknowledged_under_64_episodes_survives_a_thousand_kills(tmp_path: Path, hundred: int):
    assert kill_again_and_again(tmp_path / "data", range(100 * hundred, 100 * (hundred + 1))) > 5_000
