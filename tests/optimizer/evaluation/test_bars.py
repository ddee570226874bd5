"""The operator sets the bars of a promotion: one cycle may raise them, but never lower them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.config import EvaluationConfig, OptimizerConfig, TeachingConfig
from optimizer.evaluation.bars import AT_LEAST, AT_MOST, FIXED, find_loosened, require_bars, require_proof, tightest

OPERATOR = EvaluationConfig()
LOOSER: dict[str, Any] = {
    "num_tasks": 1,
    "num_tries": 1,
    "temperature": 2.0,
    "num_sealed_tasks": 0,
    "min_tasks": 1,
    "false_promotion_rate": 0.49,
    "margin": -1.5,
    "noninferiority_margin": 0.99,
    "serve_with_memory": False,
    "max_regression": 0.99,
    "floor": -1.0,
    "max_broken_share": 1.0,
    "max_truncated_share": 1.0,
    "max_extra_invalid_rate": 1.0,
    "max_turns_ratio": 100.0,
    "max_tokens_ratio": 100.0,
}
TIGHTER: dict[str, Any] = {
    "num_tasks": 400,
    "num_sealed_tasks": 200,
    "min_tasks": 100,
    "false_promotion_rate": 0.01,
    "margin": 0.05,
    "allow_dearer": False,
    "max_regression": 0.05,
    "floor": 0.1,
    "max_broken_share": 0.0,
    "max_truncated_share": 0.1,
    "max_extra_invalid_rate": 0.0,
    "max_turns_ratio": 1.0,
    "max_tokens_ratio": 1.0,
}


def test_every_setting_of_the_gate_has_a_tighter_side_or_is_fixed():
    assert sorted([*AT_LEAST, *AT_MOST, *FIXED]) == sorted(EvaluationConfig.model_fields)


@pytest.mark.parametrize("name", LOOSER)
def test_a_looser_bar_is_refused_with_its_field_and_the_operators_bar(name: str):
    asked = OPERATOR.model_copy(update={name: LOOSER[name]})
    with pytest.raises(ValueError, match=rf"evaluation\.{name} = {LOOSER[name]!r} .*{getattr(OPERATOR, name)!r}"):
        require_bars(asked, OPERATOR)
    assert tightest(asked, OPERATOR) == OPERATOR


def test_a_bar_that_is_no_number_is_refused():
    for name in ("margin", "max_broken_share"):
        with pytest.raises(ValueError, match=name):
            require_bars(OPERATOR.model_copy(update={name: float("nan")}), OPERATOR)


def test_tighter_bars_are_taken_together():
    asked = OPERATOR.model_copy(update=TIGHTER)
    require_bars(asked, OPERATOR)
    assert tightest(asked, OPERATOR) == asked


def test_a_policy_that_costs_more_is_allowed_only_where_the_operator_allows_it():
    frugal = EvaluationConfig(allow_dearer=False, noninferiority_margin=0.05)
    assert [it.split(" ")[0] for it in find_loosened(EvaluationConfig(noninferiority_margin=0.1), frugal)] == [
        "evaluation.noninferiority_margin",
        "evaluation.allow_dearer",
    ]
    require_bars(EvaluationConfig(allow_dearer=False), frugal)  # no margin is the tightest bar


def test_no_environment_in_which_candidates_are_proved_is_left_out():
    operator = OptimizerConfig(environment="kitchen", learn_from=["pantry"])
    with pytest.raises(ValueError, match="leaves out 'pantry'"):
        require_proof(operator.model_copy(update={"learn_from": ["garden"]}), operator)
    require_proof(operator.model_copy(update={"learn_from": ["garden", "pantry"]}), operator)
    with pytest.raises(ValueError, match="margin"):
        require_proof(operator.model_copy(update={"evaluation": EvaluationConfig(margin=-1)}), operator)


@pytest.mark.parametrize("other", ["garden", ""])
def test_the_environment_that_the_operator_names_decides(other: str):
    played = {"practice_episodes": 0, "explore_episodes": 0}
    asked = OptimizerConfig(environment=other, **played)
    with pytest.raises(ValueError, match=f"environment = '{other}' is not 'kitchen'"):
        require_proof(asked, OptimizerConfig(environment="kitchen", **played))
    require_proof(asked, asked)
    require_proof(asked, OptimizerConfig())  # it names none


NUMBERS = st.fixed_dictionaries(
    {
        "num_tasks": st.integers(0, 500),
        "min_tasks": st.integers(0, 100),
        "margin": st.floats(-2, 2),
        "noninferiority_margin": st.none() | st.floats(0.01, 0.99),
        "allow_dearer": st.booleans(),
        "false_promotion_rate": st.floats(0.001, 0.49),
        "max_tokens_ratio": st.floats(0, 9),
    }
)


@given(NUMBERS, NUMBERS)
def test_what_both_bars_make_is_looser_than_neither(ours: dict[str, Any], theirs: dict[str, Any]):
    both = tightest(EvaluationConfig(**theirs), EvaluationConfig(**ours))
    assert find_loosened(both, EvaluationConfig(**ours)) == find_loosened(both, EvaluationConfig(**theirs)) == []


@pytest.mark.parametrize("name", TeachingConfig.model_fields)
def test_the_share_of_a_teacher_may_be_made_smaller_and_never_larger(name: str):
    operator = OptimizerConfig(teaching={"max_share": 0.75})
    limit = getattr(operator.teaching, name)
    larger, smaller = (1.0, 0.5) if name == "max_share" else (limit + 1, limit - 1)
    with pytest.raises(ValueError, match=rf"teaching\.{name} = {larger!r} is not at most {limit!r}"):
        require_proof(OptimizerConfig(teaching={"max_share": 0.75, name: larger}), operator)
    require_proof(OptimizerConfig(teaching={"max_share": 0.75, name: smaller}), operator)
