"""The bars of a promotion: which of two settings of the release gate is the tighter one.

The bars are the operator's configuration. Other people may raise them for a cycle they start or have decided again, and
never lower them; settings without a tighter side (how the gate plays) stay as configured.

Invariant: every field of `EvaluationConfig` is in one of the tables; a test holds that.
"""

from __future__ import annotations

from typing import Any

from optimizer.config import EvaluationConfig, OptimizerConfig, TeachingConfig

Bar = float | None
"""The value of a setting; a bool is a number here."""

AT_LEAST = frozenset({"num_tasks", "num_sealed_tasks", "min_tasks", "margin", "floor"})
"""The larger value is the tighter one."""
AT_MOST = frozenset(
    {
        "false_promotion_rate",
        "max_regression",
        "max_broken_share",
        "max_truncated_share",
        "max_extra_invalid_rate",
        "max_turns_ratio",
        "max_tokens_ratio",
        "allow_dearer",
        "noninferiority_margin",
    }
)
"""The smaller value is the tighter one: False before True, None (no promotion for being no worse) before any margin."""
FIXED = frozenset({"num_tries", "temperature", "serve_with_memory"})
"""How the gate plays: as users are served, or as the operator says."""


def find_loosened(wanted: EvaluationConfig, operator: EvaluationConfig) -> list[str]:
    """Return a sentence for each field in which `wanted` is looser than the operator's bar, or plays differently."""
    problems = []
    for name in EvaluationConfig.model_fields:
        ours, theirs = getattr(operator, name), getattr(wanted, name)
        # equal to the tighter of the two means not looser; for FIXED it means equal to the operator's
        if theirs == _tighter(name, theirs, ours):
            continue
        allowed = f"exactly {ours!r}" if name in FIXED else f"at {'least' if name in AT_LEAST else 'most'} {ours!r}"
        problems.append(f"evaluation.{name} = {theirs!r} is not {allowed}, which is the operator's bar")
    return problems


def require_bars(asked: EvaluationConfig, operator: EvaluationConfig) -> None:
    """Raise ValueError, naming each field and its bar, where `asked` is looser than the operator's configuration."""
    if problems := find_loosened(asked, operator):
        raise ValueError(
            f"{'; '.join(problems)}: leave it out or make it tighter, or ask with a key that has the scope 'admin'"
        )


def require_proof(asked: OptimizerConfig, operator: OptimizerConfig) -> None:
    """Raise ValueError if a cycle would need less than the operator's configuration asks for.

    That is a looser bar, a larger share for one teacher, another environment than the one that the operator names, or
    an environment of `learn_from` in which its candidate would not be played.
    """
    require_bars(asked.evaluation, operator.evaluation)
    # the default is nobody's decision: without a name of the operator's, whoever starts a cycle chooses
    if "environment" in operator.model_fields_set and asked.environment != operator.environment:
        raise ValueError(
            f"environment = {asked.environment!r} is not {operator.environment!r}, by which the operator has "
            "candidates proved ('' is live traffic): leave it out, or ask with a key that has the scope 'admin'"
        )
    # A key that can flood the rows of a cycle must not be able to lift the limits that bound it.
    for name in TeachingConfig.model_fields:
        limit, wanted = getattr(operator.teaching, name), getattr(asked.teaching, name)
        if wanted > limit:
            raise ValueError(
                f"teaching.{name} = {wanted!r} is not at most {limit!r}, which is the operator's limit: leave it out "
                "or make it tighter, or ask with a key that has the scope 'admin'"
            )
    # each environment of `learn_from` is a veto of the gate (release_gate._play_regressions), so dropping one lowers a
    # bar
    left_out = sorted(set(operator.learn_from) - {*asked.learn_from, asked.environment})
    if left_out and asked.environment:  # live traffic is proved by what clients played
        raise ValueError(
            f"learn_from = {asked.learn_from!r} leaves out {left_out[0]!r}, in which the operator has candidates "
            "proved: add it, or ask with a key that has the scope 'admin'"
        )


def tightest(one: EvaluationConfig, operator: EvaluationConfig) -> EvaluationConfig:
    """Return the settings that hold both bars; how the gate plays is the operator's."""
    fields: dict[str, Any] = {
        name: _tighter(name, getattr(one, name), getattr(operator, name)) for name in EvaluationConfig.model_fields
    }
    return EvaluationConfig(**fields)


def _tighter(name: str, one: Bar, operator: Bar) -> Bar:
    if name in FIXED:
        return operator
    if one is None or operator is None:  # no margin at all is the tightest
        return None
    # allow_dearer is compared as a number: False is the tighter one
    return max(one, operator) if name in AT_LEAST else min(one, operator)
