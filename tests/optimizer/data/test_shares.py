"""The share of rows that one teacher may give, and its mention in the report."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from memory.records.trajectories import GradedTrajectory
from memory.teaching import Teacher, TeacherKind
from optimizer.config import TeachingConfig
from optimizer.data.shares import choose_rows, count_rows
from optimizer.rewards import choose_newest

PRACTICE = Teacher(kind=TeacherKind.ENVIRONMENT)
SHOP = Teacher("shop", "key_shop")
APP = Teacher("", "key_app")
ANNA, BEN = (Teacher("", "key_app", name) for name in ("anna@example.org", "ben@example.org"))


def choose(*groups: tuple[Teacher, int], floor: int = 16, **config) -> tuple[dict[Teacher, int], Counter[str]]:
    """Return the number of kept rows by teacher, and the reasons for the dropped ones."""
    rows = [(teacher,) for teacher, num_rows in groups for _ in range(num_rows)]
    counts: Counter[str] = Counter()
    kept = choose_rows(rows, TeachingConfig(**config), floor=floor, seed=0, counts=counts)
    assert kept == sorted(set(kept)) and len(kept) + counts.total() == len(rows)
    return Counter(rows[position][0] for position in kept), counts


def test_forty_rows_of_another_tenant_never_outweigh_two_of_the_operator():
    kept, counts = choose((SHOP, 40), (PRACTICE, 2))
    assert kept == {SHOP: 2, PRACTICE: 2} and counts["over_key_share"] + counts["over_tenant_share"] == 38


def test_a_tenant_may_give_as_many_rows_as_all_others_together():
    kept, _ = choose((SHOP, 40), (PRACTICE, 20), (APP, 10))
    assert kept == {SHOP: 30, PRACTICE: 20, APP: 10}


def test_whoever_teaches_alone_is_not_cut():
    assert choose((ANNA, 150))[0] == {ANNA: 150}
    assert choose((SHOP, 40))[0] == {SHOP: 40}
    assert choose((PRACTICE, 500))[1] == Counter()


def test_one_row_of_a_second_person_leaves_the_first_enough_to_train_on():
    kept, counts = choose((ANNA, 100), (BEN, 1), floor=16)
    assert kept == {ANNA: 16, BEN: 1} and counts == {"over_user_share": 84}


def test_practice_counts_as_the_others_and_is_never_cut_itself():
    kept, _ = choose((ANNA, 100), (PRACTICE, 60))
    assert kept == {ANNA: 60, PRACTICE: 60}
    assert choose((ANNA, 5), (PRACTICE, 900))[0] == {ANNA: 5, PRACTICE: 900}


def test_rows_are_bounded_for_each_user_key_and_tenant():
    lifted = {"max_share": 1.0}
    assert choose((ANNA, 9), (BEN, 9), max_rows_per_user=4, **lifted)[0] == {ANNA: 4, BEN: 4}
    assert choose((ANNA, 9), (BEN, 9), max_rows_per_key=7, **lifted)[0].total() == 7
    kept, counts = choose((SHOP, 9), (Teacher("shop", "key_2"), 9), (APP, 9), max_rows_per_tenant=6, **lifted)
    assert kept[APP] == 9 and kept.total() == 15 and counts == {"over_tenant_cap": 12}


def test_a_preference_counts_for_both_who_judged_its_sides():
    rows = [(SHOP, PRACTICE)] * 10 + [(PRACTICE, PRACTICE)] * 3
    kept = choose_rows(rows, TeachingConfig(), floor=16, seed=0, counts=Counter())
    assert sum(SHOP in rows[position] for position in kept) == 3
    counted = count_rows(rows, {})
    assert {each["teacher"]: each["num_rows"] for each in counted} == {"environment": 13, "feedback": 10}


def test_a_repeated_stage_in_another_process_keeps_the_same_rows():
    code = """
from collections import Counter
from memory.teaching import Teacher
from optimizer.config import TeachingConfig
from optimizer.data.shares import choose_rows
rows = [(Teacher("", "key_app", f"user{n}"), Teacher("", "key_app", f"user{n + 1}")) for n in range(9)] * 9
print(choose_rows(rows, TeachingConfig(max_rows_per_user=5, max_share=1), floor=1, seed=0, counts=Counter()))
"""
    kept = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (0, 3)  # these give both orders of a set of two users
    }
    assert len(kept) == 1


def test_the_report_names_keys_and_no_persons():
    rows = [(ANNA,)] * 3 + [(PRACTICE,)] * 2
    first, second = count_rows(rows, {"key_app": "the app"})
    assert (first["key_name"], first["num_rows"], len(first["user"])) == ("the app", 3, 8)
    assert (second["teacher"], second["key_id"], second["user"]) == ("environment", None, "")
    assert "anna" not in str(first)
    assert count_rows([(ANNA,)], {})[0]["user"] == first["user"] != count_rows([(BEN,)], {})[0]["user"]


def test_a_flood_by_one_teacher_leaves_the_pool_what_the_others_taught():
    learnable = [GradedTrajectory(None, [], 1.0, True, teacher) for teacher in [BEN, PRACTICE, BEN, *[ANNA] * 50]]
    chosen = choose_newest(learnable, 7)
    assert [each.teacher for each in chosen] == [BEN, PRACTICE, BEN, *[ANNA] * 4]
    assert choose_newest(learnable[:3], 7) == learnable[:3]
    ordered = [GradedTrajectory(None, [], number, True, ANNA) for number in range(9)]
    assert [each.reward for each in choose_newest(ordered, 3)] == [6, 7, 8]
