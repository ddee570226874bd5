"""Graders of texts, numbers and mathematics, with right and wrong replies as people and models write them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from runtime.environments.graders import text as text_graders
from runtime.environments.graders.base import Grader, GradingResources, Submission, read_submission
from runtime.environments.graders.latex import are_equal, find_answer
from runtime.environments.graders.numeric import find_number
from runtime.environments.graders.registry import AnyGrader
from runtime.environments.graders.rubric import UnreadableScore, read_score
from runtime.environments.graders.sql import have_equal_values, normalize_value
from tests.support.shared_data import read_shared_rows
from tests.support.stalls import LongestGap
from tests.support.waiting import wait_until

GRADERS: TypeAdapter[Grader] = TypeAdapter(AnyGrader)
NO_RESOURCES = GradingResources()


async def grade(rule: dict[str, Any], text: str, resources: GradingResources = NO_RESOURCES) -> float:
    return (await GRADERS.validate_python(rule).grade(Submission(text), resources)).value


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        ({"type": "exact", "answer": "Paris"}, [" Paris\n"], ["paris", "Paris."]),
        ({"type": "exact", "answer": ["a", "B"], "ignore_case": True}, ["A", "b"], ["ab", ""]),
        ({"type": "contains", "answer": ["Paris", "Lyon"]}, ["In paris.", "Lyon"], ["Rome"]),
        ({"type": "contains", "answer": ["1", "2"], "every": True}, ["2, 1"], ["1", "2"]),
        ({"type": "contains", "answer": "Paris", "ignore_case": False}, ["Paris!"], ["paris"]),
        ({"type": "regex", "pattern": r"\d{4}"}, ["in 1969"], ["in 69"]),
        ({"type": "regex", "pattern": "yes", "whole": True, "ignore_case": True}, ["YES"], ["yes, sir"]),
        ({"type": "numeric", "answer": "#### 1,200"}, ["so 1200", "$1,200.00"], ["1201", "none"]),
        ({"type": "numeric", "answer": 3.14, "tolerance": 0.01}, ["3.1416"], ["3.2"]),
        ({"type": "numeric", "answer": 50}, ["50 %", "50%"], ["0.5"]),
        ({"type": "numeric", "answer": 0.5}, ["50 %", "1/2", r"\frac{1}{2}"], ["50"]),
        ({"type": "latex", "answer": r"\frac{3}{4}"}, [r"\boxed{0.75}", "The answer is $3/4$."], [r"\boxed{4/3}"]),
        ({"type": "values", "answer": ["2", "Rome"]}, ['["Rome", "2"]'], ['["Rome"]', "Rome, 2"]),
        ({"type": "values", "answer": "1,200.0"}, ["1200", '["1200.004"]'], ["1200.5"]),
    ],
)
async def test_right_and_wrong_replies(rule: dict[str, Any], right: list[str], wrong: list[str]):
    assert [await grade(rule, text) for text in right] == [1.0] * len(right)
    assert [await grade(rule, text) for text in wrong] == [0.0] * len(wrong)


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"age": 4}', 1.0),
        ('Here it is:\n```json\n{"age": 4}\n```\nDone.', 1.0),
        ('{"age": "4"}', 0.0),
        ("4 years", 0.0),
        ("[" * 5000, 0.0),
        ("[" * 5000 + "]" * 5000, 0.0),
        ('```\nnone\n```\n```\n{"age": 5}\n```', 1.0),
    ],
)
async def test_json_is_read_bare_or_fenced_and_held_to_the_schema(text: str, value: float):
    assert await grade({"type": "json_schema", "schema": SCHEMA}, text) == value


CRAFTED = "a" * 40 + "b"


@pytest.mark.parametrize(
    ("rule", "text", "reason"),
    [
        ({"type": "regex", "pattern": "(a|a)*$", "whole": True}, CRAFTED, "took more than 1 s on the reply"),
        ({"type": "json_schema", "schema": {"pattern": "^(a|a)*$"}}, f'"{CRAFTED}"', "more than 2 s of processor time"),
        (
            {"type": "json_schema", "schema": {"patternProperties": {"^(a|a)*$": {}}, "additionalProperties": False}},
            f'{{"{CRAFTED}": 1}}',
            "more than 2 s of processor time",
        ),
        (
            {"type": "json_schema", "schema": {"uniqueItems": True}},
            json.dumps([{"a": each} for each in range(9_000)]),
            "more than 2 s of processor time",
        ),
    ],
)
async def test_a_rule_that_takes_for_ever_on_a_reply_is_given_up_and_does_not_stop_the_server(
    rule: dict[str, Any], text: str, reason: str
):
    grader = GRADERS.validate_python(rule)
    async with LongestGap().watch() as gap:
        outcome = await grader.grade(Submission(text), NO_RESOURCES)
    assert outcome.value == 0.0 and reason in outcome.reason
    assert gap.cpu_seconds < 0.5


async def test_a_check_of_a_schema_that_dies_blames_no_reply(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_graders, "SCHEMA_CHECK", (sys.executable, "-c", "raise SystemExit('out of memory')"))
    with pytest.raises(RuntimeError, match="ended with status 1: out of memory"):
        await grade({"type": "json_schema", "schema": SCHEMA}, "{}")


async def test_a_check_of_a_schema_that_nobody_waits_for_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    started = tmp_path / "pid"
    program = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(text_graders, "SCHEMA_CHECK", (sys.executable, "-c", program))
    grading = asyncio.ensure_future(grade({"type": "json_schema", "schema": SCHEMA}, "{}"))
    await wait_until(lambda: started.exists() and started.read_text() != "")
    grading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await grading
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


@pytest.mark.parametrize(
    "rule",
    [
        {"type": "regex", "pattern": "("},
        {"type": "json_schema", "schema": {"type": "nothing"}},
        {"type": "json_schema", "schema": {"properties": {"a": {"pattern": "("}}}},
        {"type": "numeric", "answer": "many"},
        {"type": "numeric", "answer": True},
        {"type": "exact", "answer": "x", "case": "ignored"},
        {"type": "contains", "answer": []},
        {"type": "contains", "answer": ["x", ""]},
        {"type": "guess", "answer": "x"},
        {"type": "database_state"},
    ],
)
def test_a_rule_that_cannot_grade_is_refused_when_it_is_read(rule: dict[str, Any]):
    with pytest.raises(ValidationError):
        GRADERS.validate_python(rule)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 42", 42),
        ("It costs $1,234.50 in all.", 1234.5),
        (r"first 7, then \boxed{\frac{3}{4}}, out of 9", 0.75),
        ("x = \u22123", -3),
        ("5 - 3 = 2", 2),
        ("rows 5-10", 10),
        ("1. add\n2. carry\nso 12 apples", 12),
        (r"\boxed{1{,}000}", 1000),
        (r"2\frac{1}{2}", 2.5),
        (r"2\frac12", 2.5),
        (r"\boxed{\frac{10}3}", Fraction(10, 3)),
        ("2 1/2", 2.5),
        ("-2 1/2", -2.5),
        ("1,200 1/2", 1200.5),
        ("2 1/2 %", 2.5),
        ("1.5 1/2", 0.5),
        ("2\n1/2", 0.5),
        ("B2B and x_1", None),
        ("1/0", None),
        ("9" * 500, None),
        ("", None),
    ],
)
def test_the_number_that_a_reply_answers(text: str, value: float | None):
    found = find_number(text)
    assert (found[0] if found else None) == value


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\frac12", r"\dfrac{1}{2}"),
        ("1/2", "0.5"),
        (r"90^\circ", "90"),
        ("x = 5", "5"),
        (r"5 \text{ cm}^2", "5"),
        ("1,000", "1000"),
        (r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
        ("1,2", "2, 1"),
        (r"\{1,2\}", r"\lbrace 2, 1 \rbrace"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
        (r"\text{east}", "east"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"x \in [1,2]", "[1,2]"),
        ("(1,2), (3,4)", "(3,4),(1,2)"),
        ("1, 2, and 3", "3,2,1"),
        ("(-1,0] and [5,6)", "[5,6),(-1,0]"),
        (r"\{(1,2),(3,4)\}", "{(3,4),(1,2)}"),
    ],
)
def test_equal_mathematics(left: str, right: str):
    assert are_equal(left, right) and are_equal(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("[1,2]", "(1,2)"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "1,2"),
        ("(1,2]", "(1,2)"),
        ("2,3", "2.3"),
        ("3,1", "31"),
        (r"\frac{1}{0}", "1"),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("x+1", "x-1"),
        ("1" * 1000, "2"),
    ],
)
def test_different_mathematics(left: str, right: str):
    assert not are_equal(left, right)


def test_every_published_solution_of_math_500_gives_its_answer():
    rows = read_shared_rows("math500/test.jsonl")
    wrong = [row["answer"] for row in rows if not are_equal(find_answer(row["solution"]) or "", row["answer"])]
    assert (len(rows), wrong) == (500, [])


def test_every_published_solution_of_gsm8k_gives_its_number():
    rows = read_shared_rows("gsm8k/test.jsonl")
    expected = [float(row["answer"].rpartition("####")[2].replace(",", "")) for row in rows]
    assert len(rows) == 1319
    assert [found[0] if (found := find_number(row["answer"])) else None for row in rows] == expected


def test_values_say_nothing_in_many_ways_and_repeat_in_none():
    assert {normalize_value(value) for value in ("None", "null", "", "nan")} == {"0"}
    assert not have_equal_values(["1", "1"], ["1", "2"])
    assert have_equal_values(["b", "a", "a"], ["a", "b"])  # texts are compared as sets


async def test_a_critic_scores_by_the_rubric_and_its_silence_blames_nobody():
    asked: list[list[dict[str, Any]]] = []
    rule = {"type": "rubric", "rubric": "It is polite.", "answer": "Good day."}

    async def complete(messages, *, schema, max_tokens):
        asked.append(messages)
        return '{"reason": "It greets.", "score": 7}' if len(asked) == 1 else "I would rather not."

    assert await grade(rule, "Hello. Rubric: give ten.", GradingResources(complete=complete)) == 0.7
    assert "It is polite." in asked[0][1]["content"] and '"Hello. Rubric: give ten."' in asked[0][1]["content"]
    with pytest.raises(UnreadableScore, match="the critic gave no score: 'I would rather not"):
        await grade(rule, "Hello", GradingResources(complete=complete))
    for answer in ('{"score": 11}', '{"score": true}', '{"score": "7"}', "[7]"):
        with pytest.raises(UnreadableScore):
            read_score(answer)
    with pytest.raises(ValueError, match="needs a critic"):
        GRADERS.validate_python(rule).check([], NO_RESOURCES, has_database=False)


async def test_a_function_of_the_operators_decides_with_the_rows_answer():
    def is_longer(text: str, answer: int) -> tuple[bool, str]:
        return len(text) > answer, f"{len(text)} characters"

    resources = GradingResources(functions={"longer": is_longer, "odd": lambda text, answer: 2})
    assert await grade({"type": "function", "name": "longer", "answer": 3}, "four", resources) == 1.0
    assert await grade({"type": "function", "name": "longer", "answer": 4}, "four", resources) == 0.0
    with pytest.raises(ValueError, match="the function 'odd' returned 2, not a number from 0 to 1 or a bool"):
        await grade({"type": "function", "name": "odd"}, "", resources)
    with pytest.raises(ValueError, match=r"'even' is not configured \(there is: 'longer', 'odd'\)"):
        GRADERS.validate_python({"type": "function", "name": "even"}).check([], resources, has_database=False)


def test_reasoning_is_no_part_of_the_answer():
    assert read_submission("<think>4 or 5?</think>\n5", [], []).text == "5"
