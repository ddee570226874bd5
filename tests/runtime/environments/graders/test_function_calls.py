"""The leaderboard's rules for function calls, one by one, and on all of its data where its checker is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.environments.graders.base import Call, GradingResources, Submission
from runtime.environments.graders.function_calls import FunctionCall, find_problem
from tests.support.shared_data import find_shared

PARAMETERS = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "level": {"type": "number"},
    "deep": {"type": "boolean"},
    "names": {"type": "array", "items": {"type": "string"}},
    "point": {"type": "array", "items": {"type": "number"}},
    "where": {"type": "object"},
    "stops": {"type": "array", "items": {"type": "object"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": PARAMETERS, "required": ["city"]},
        },
    }
    for name in ("go", "stay")
]
CITY: dict[str, Any] = {"city": ["Rome"]}


def is_right(allowed: dict[str, Any], **arguments: Any) -> bool:
    call = Call("go", {"city": "Rome", **arguments})
    return find_problem([call], [{"go": {**CITY, **allowed}}], TOOLS) is None


@pytest.mark.parametrize("city", ["Rome", "rome", " R-o.m,e_", "ROME"])
def test_text_is_compared_without_case_spaces_and_some_punctuation(city: str):
    assert find_problem([Call("go", {"city": city})], [{"go": CITY}], TOOLS) is None
    assert find_problem([Call("go", {"city": f"{city}!"})], [{"go": CITY}], TOOLS) is not None


def test_types_are_exact_but_for_integers_as_numbers():
    assert is_right({"days": [2]}, days=2)
    assert not is_right({"days": [2]}, days=2.0) and not is_right({"days": [1]}, days=True)
    assert not is_right({"days": [2]}, days="2")
    assert is_right({"level": [2.0]}, level=2) and is_right({"level": [2]}, level=2.0)
    assert is_right({"deep": [True]}, deep=True) and not is_right({"deep": [True]}, deep=1)


def test_an_argument_may_be_left_out_only_where_the_empty_text_is_allowed():
    assert is_right({"days": ["", 2]}) and is_right({"days": ["", 2]}, days=2)
    assert not is_right({"days": [2]})
    assert not is_right({}, days=2)
    assert find_problem([Call("go", {})], [{"go": {"city": ["", "Rome"]}}], TOOLS) == "'go' lacks the argument 'city'"


def test_lists_keep_their_order_and_the_types_of_their_items():
    assert is_right({"names": [["Ann", "Bob"]]}, names=["ann", "BOB"])
    assert not is_right({"names": [["Ann", "Bob"]]}, names=["Bob", "Ann"])
    assert is_right({"point": [[1.5, 2.5]]}, point=[1.5, 2.5])
    assert not is_right({"point": [[1.5, 2.5]]}, point=[1.5, "2.5"])


def test_objects_allow_values_for_each_key():
    allowed = {"where": [{"street": ["Main St", "Main Street"], "number": ["", 4]}]}
    assert is_right(allowed, where={"street": "main street"})
    assert is_right(allowed, where={"street": "Main St.", "number": 4})
    assert not is_right(allowed, where={"number": 4})
    assert not is_right(allowed, where={"street": "Main St", "floor": 2})
    assert not is_right(allowed, where={"street": ["Main St"]})
    stops = {"stops": [[{"at": ["A"]}, {"at": ["B"]}]]}
    assert is_right(stops, stops=[{"at": "a"}, {"at": "b"}])
    assert not is_right(stops, stops=[{"at": "b"}, {"at": "a"}]) and not is_right(stops, stops=[{"at": "a"}])


def test_an_allowed_value_of_another_type_is_taken_as_it_is():
    assert is_right({"days": ["two days"]}, days="two days")
    assert not is_right({"days": ["two days"]}, days="Two days")


def test_several_calls_come_in_any_order_and_none_is_left_over():
    rome, oslo = Call("go", {"city": "Rome"}), Call("stay", {"city": "Oslo"})
    expected = [{"stay": {"city": ["Oslo"]}}, {"go": CITY}]
    assert find_problem([rome, oslo], expected, TOOLS) is None
    for calls in ([rome], [rome, rome], [rome, oslo, oslo], []):
        assert find_problem(calls, expected, TOOLS) is not None
    exact, inexact = Call("go", {"city": "Rome", "days": 5}), Call("go", {"city": "Rome", "days": 5.0})
    twice = [{"go": {**CITY, "days": [5]}}] * 2
    assert find_problem([exact, exact], twice, TOOLS) is None
    assert find_problem([inexact, exact], twice, TOOLS) is not None  # although 5 == 5.0
    assert find_problem([Call("go", None)], [{"go": CITY}], TOOLS) == "the arguments of 'go' are not a JSON object"


async def test_a_row_may_want_no_call_or_any():
    none, some = FunctionCall(type="function_call", calls=[]), FunctionCall(type="function_call", calls="any")
    for calls, values in [((), (1.0, 0.0)), ((Call("go", {}),), (0.0, 1.0)), ((Call("go", None),), (1.0, 0.0))]:
        submission = Submission("", calls, TOOLS)
        graded = [await rule.grade(submission, GradingResources()) for rule in (none, some)]
        assert tuple(outcome.value for outcome in graded) == values


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        ([{"fly": {}}], "the expected call 'fly' is none of the row's tools"),
        ([{"go": {"speed": [1]}}], "the tool 'go' has no parameter 'speed', so no call can be right"),
        ([{"go": {}, "stay": {}}], "one name"),
    ],
)
def test_a_row_that_no_call_can_satisfy_is_refused(calls: list[Any], problem: str):
    rule = FunctionCall(type="function_call", calls=calls)
    with pytest.raises(ValueError, match=problem):
        rule.check(TOOLS, GradingResources(), has_database=False)
    with pytest.raises(ValueError, match="needs tools"):
        rule.check([], GradingResources(), has_database=False)


def test_the_leaderboards_own_checker_agrees_on_its_data():
    pytest.importorskip("bfcl_eval", reason="the package bfcl-eval, whose checker is the judge, is not installed")
    from tests.bench.bfcl_agreement import compare, load_checker

    directory: Path = find_shared("bfcl")
    counts, disagreements = compare(directory, load_checker(), num_tries=1)
    assert counts["n"] > 40_000 and 0.3 < counts["accepted"] / counts["n"] < 0.5
    assert counts["agree"] / counts["n"] >= 0.995, disagreements[:20]
