"""Compares the database's rows with the acknowledged writes, and each record with the expected episode of its name.

It reads with plain sqlite3, because the project's own code may be what is broken.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections import defaultdict
from contextlib import closing
from pathlib import Path

from tests.faults.support.worlds import answer_of, expected_steps


def check_records(path: Path, told: list[tuple]) -> None:
    """Assert that no acknowledged write is lost, no episode is stored twice, and every record is whole."""
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
    """Return the ids by name of the episode, and stages, answers, steps and rewards by id."""
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
    """Return whether the steps are a prefix of those expected, and all of them if the episode was closed."""
    plain = [
        (position, kind, content, None if output_ids is None else array("I", output_ids).tobytes())
        for position, (kind, content, output_ids) in enumerate(expected)
    ]
    return found == (plain if is_closed else plain[: len(found)])
