"""Graders made of graders."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission
from runtime.environments.graders.composed import Weighted
from runtime.environments.graders.registry import AnyGrader

GRADERS: TypeAdapter[Grader] = TypeAdapter(AnyGrader)
SHORT = {"type": "regex", "pattern": ".{1,10}", "whole": True}
GREETS = {"type": "contains", "answer": "hello"}


def part(value: object) -> dict[str, Any]:
    """Return a grader that gives `value`."""
    return {"type": "function", "name": "answer", "answer": value}


RESOURCES = GradingResources(functions={"answer": lambda text, answer: answer})


async def grade(rule: dict[str, Any], text: str) -> Outcome:
    return await GRADERS.validate_python(rule).grade(Submission(text), RESOURCES)


async def test_all_parts_must_be_satisfied():
    rule = {"type": "all", "graders": [SHORT, GREETS]}
    assert [(await grade(rule, text)).value for text in ("hello", "bye", "hello, my friend")] == [1.0, 0.0, 0.0]
    assert (await grade(rule, "hello")).reason == "the pattern matches; the reply contains the answer"
    assert (await grade(rule, "bye")).reason == "the reply does not contain 'hello'"
    assert (await grade({"type": "all", "graders": [part(0.9), part(0.4), part(0.6)]}, "")).value == 0.4


async def test_a_part_behind_a_zero_is_not_asked():
    broken = part("no number")
    assert (await grade({"type": "all", "graders": [GREETS, broken]}, "bye")).value == 0.0
    with pytest.raises(ValueError, match="not a number from 0 to 1"):
        await grade({"type": "all", "graders": [GREETS, broken]}, "hello")


async def test_a_weighted_reward_is_the_mean_by_the_weights():
    rule = {"type": "weighted", "parts": [{"weight": 3, "grader": SHORT}, {"weight": 1, "grader": GREETS}]}
    rewards = [(await grade(rule, text)).value for text in ("hello", "bye", "hello, my friend", "bye, my friend")]
    assert rewards == [1.0, 0.75, 0.25, 0.0]
    assert (await grade(rule, "bye")).reason == "1: the pattern matches; 0: the reply does not contain 'hello'"


async def test_a_part_that_cannot_grade_leaves_no_reward_of_the_others():
    rule = {"type": "weighted", "parts": [{"weight": 1, "grader": GREETS}, {"weight": 1e-9, "grader": part("none")}]}
    with pytest.raises(ValueError, match="not a number from 0 to 1"):
        await grade(rule, "hello")


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, exclude_min=True, allow_infinity=False)), min_size=1, max_size=5)
)
def test_a_weighted_reward_lies_between_those_of_its_parts(parts: list[tuple[float, float]]):
    grader = Weighted.model_validate(
        {"type": "weighted", "parts": [{"weight": weight, "grader": part(value)} for value, weight in parts]}
    )
    reward = grader.mean([value for value, _ in parts])
    values = [value for value, _ in parts]
    assert min(values) - 1e-9 <= reward <= min(1.0, max(values) + 1e-9)


@pytest.mark.parametrize("weight", [0, -1, "heavy", float("inf"), float("nan"), None])
def test_a_weight_is_a_number_above_zero(weight: object):
    with pytest.raises(ValidationError, match="weight"):
        GRADERS.validate_python({"type": "weighted", "parts": [{"weight": weight, "grader": GREETS}]})


@pytest.mark.parametrize("rule", [{"type": "all", "graders": []}, {"type": "weighted", "parts": []}])
def test_a_composition_has_parts(rule: dict[str, Any]):
    with pytest.raises(ValidationError):
        GRADERS.validate_python(rule)


def test_parts_are_checked_and_may_be_composed_themselves():
    inner = {"type": "weighted", "parts": [{"weight": 1, "grader": {"type": "function", "name": "even"}}]}
    rule = GRADERS.validate_python({"type": "all", "graders": [GREETS, inner]})
    with pytest.raises(ValueError, match="'even' is not configured"):
        rule.check([], RESOURCES, has_database=False)
    assert not rule.needs_critic
    asks = {"type": "all", "graders": [{"type": "url", "critic": "tone"}]}
    assert GRADERS.validate_python({**inner, "parts": [{"weight": 1, "grader": asks}]}).needs_critic
