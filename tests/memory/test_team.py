"""The role of a step, the decision of a check, and the position of a plan."""

from __future__ import annotations

import pytest

from memory.conversation import show_memory, show_plan
from memory.schema import Step, StepKind
from memory.team import Check, Role, find_plan, read_by_client, read_check

ASKED = [{"role": "system", "content": "You count."}, {"role": "user", "content": "2 + 3?"}]


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("ACCEPT", Check(True)),
        ("**Accept**", Check(True)),
        ("Accepted.", Check(True)),
        ("REVISE: it is 5", Check(False, "it is 5")),
        ("revise - it is 5.\nReally.", Check(False, "it is 5.\nReally.")),
        ("Let me see.\n\nREVISE: it is 5", Check(False, "it is 5")),
        ("REVISE: wrong.\nACCEPT nothing else", Check(False, "wrong.\nACCEPT nothing else")),
        ("REVISE:", None),
        ("Acceptable", None),
        ("I would accept it", None),
        ("", None),
    ],
)
def test_a_check_is_the_first_line_that_decides(text: str, decision: Check | None):
    assert read_check(text) == decision


def test_a_plan_is_shown_behind_the_users_text_and_memory_before_it():
    shown = show_memory(show_plan(ASKED, "Add."), "<memory>M</memory>")
    assert shown[1]["content"] == "<memory>M</memory>\n\n2 + 3?\n\nA plan, which may be wrong:\nAdd."
    parts = show_plan([{"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]}], "Add.")
    assert [part["text"] for part in parts[0]["content"]] == ["2 + 3?", "\n\nA plan, which may be wrong:\nAdd."]


@pytest.mark.parametrize("plan", ["", " \n"])
def test_without_a_plan_the_opening_is_the_same(plan: str):
    assert show_plan(ASKED, plan) == ASKED and show_plan(ASKED[:1], "Add.") == ASKED[:1]


def test_a_client_reads_neither_plan_nor_check_nor_note_nor_an_answer_that_was_sent_back():
    def step(kind: str, role: Role | None, content: str) -> Step:
        return Step(trajectory_id="t", position=0, kind=StepKind(kind), role=role, content=content)

    steps = [
        step("model", Role.PLANNER, "Add."),
        step("user", None, "by the way"),
        step("model", Role.ACTOR, "6"),
        step("model", Role.CHECKER, "REVISE: no"),
        step("user", Role.CHECKER, "no"),
        step("model", Role.ACTOR, "5"),
        step("model", Role.CHECKER, "ACCEPT"),
    ]
    assert [each.content for each in read_by_client(steps)] == ["by the way", "5"] and find_plan(steps) == "Add."
