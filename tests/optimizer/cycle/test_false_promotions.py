"""The release gate's rate of false promotions over ten cycles, and its power for true improvements."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.special import beta, betainc

from optimizer.config import EvaluationConfig
from optimizer.evaluation.cells import Cell, CellResult
from optimizer.evaluation.decision import Decision, alpha_of, decide
from optimizer.evaluation.intervals import anytime_low, anytime_p, compare_paired
from tests.optimizer.played import EPISODE

NUM_TASKS, NUM_CYCLES = 200, 10
CONFIG = EvaluationConfig()


def cell(policy: int, successes: list[bool], prompt_tokens: list[int] | None = None) -> CellResult:
    tokens = prompt_tokens or [2000] * len(successes)
    played = [
        replace(EPISODE, task=str(number), is_success=won, prompt_tokens=tokens[number])
        for number, won in enumerate(successes)
    ]
    return CellResult(Cell("candidate" if policy else "incumbent", policy, False), played)


@cache
def promotes(num_won: int, num_lost: int, look: int) -> bool:
    """Return whether the gate promotes on 200 tasks of which both won 60."""
    both, neither = 60, NUM_TASKS - 60 - num_won - num_lost
    ours = [True] * (both + num_won) + [False] * (num_lost + neither)
    theirs = [True] * both + [False] * num_won + [True] * num_lost + [False] * neither
    return decide(cell(1, ours), cell(0, theirs), CONFIG, look=look).decision is Decision.PROMOTE


@cache
def fewest_wins(num_differing: int, look: int) -> int:
    """Return how many of the differing tasks a candidate must win; one more than `num_differing` if none is enough."""
    if num_differing == 0:
        return 1
    num_won = fewest_wins(num_differing - 1, look)
    while num_won <= num_differing and not promotes(num_won, num_differing - num_won, look):
        num_won += 1
    return num_won


def share_of_false_promotions(discordance: float, num_runs: int, *, spends: bool = True) -> float:
    """Return the share of `num_runs` servers that promote one of ten candidates, none of them better."""
    dice = np.random.default_rng(7)
    differing = dice.binomial(NUM_TASKS, discordance, size=(num_runs, NUM_CYCLES))
    won = dice.binomial(differing, 0.5)
    fooled = np.zeros(num_runs, dtype=bool)
    for cycle in range(NUM_CYCLES):
        look = cycle + 1 if spends else 1
        needed = [fewest_wins(int(number), look) for number in differing[:, cycle]]
        fooled |= won[:, cycle] >= np.asarray(needed)
    return float(fooled.mean())


@pytest.mark.parametrize("discordance", [0.05, 0.1, 0.2, 0.4])
def test_ten_cycles_of_no_change_promote_one_with_at_most_five_percent(discordance):
    assert share_of_false_promotions(discordance, 10_000) <= 0.05


def test_without_spending_the_same_rule_would_be_fooled_far_more_often():
    assert share_of_false_promotions(0.2, 1000, spends=False) > 0.1


def test_no_worse_and_cheaper_is_part_of_the_same_budget():
    config = EvaluationConfig(noninferiority_margin=0.05)
    dice = np.random.default_rng(11)
    fooled, num_runs = 0, 300
    for _ in range(num_runs):
        theirs = dice.random(NUM_TASKS) < 0.6
        ours = np.where(dice.random(NUM_TASKS) < 0.05, dice.random(NUM_TASKS) < 0.5, theirs)
        tokens = dice.normal(4000, 800, size=(2, NUM_TASKS)).astype(int).tolist()
        candidate, incumbent = cell(1, ours.tolist(), tokens[0]), cell(0, theirs.tolist(), tokens[1])
        verdict = decide(candidate, incumbent, config, without_memory=candidate)
        fooled += verdict.decision is Decision.PROMOTE
    assert fooled / num_runs <= alpha_of(1, config.false_promotion_rate)


@cache
def p_of(num_won: int, num_lost: int, is_open_ended: bool) -> float:
    if is_open_ended:
        return anytime_p([1.0] * num_won + [-1.0] * num_lost)
    return compare_paired([1.0] * num_won + [0.0] * num_lost, [0.0] * num_won + [1.0] * num_lost).p_better


@pytest.mark.parametrize("is_open_ended", [True, False])
def test_whoever_watches_the_outcomes_and_chooses_the_moment_gains_nothing(is_open_ended):
    """After every task from the thirtieth to the 300th, somebody looks whether the gate would promote now."""
    bar, num_runs = alpha_of(1, CONFIG.false_promotion_rate), 1000
    outcomes = np.random.default_rng(3).choice([-1, 0, 1], size=(num_runs, 300), p=[0.2, 0.6, 0.2])
    won, lost = ((outcomes == sign).cumsum(axis=1)[:, 29:] for sign in (1, -1))

    fooled = [
        any(p_of(int(a), int(b), is_open_ended) <= bar for a, b in zip(*counts, strict=True) if a > b)
        for counts in zip(won, lost, strict=True)
    ]

    # the exact test alone would be fooled several times as often as it may be
    assert np.mean(fooled) <= bar if is_open_ended else np.mean(fooled) > 2 * bar


def test_the_lower_bound_that_holds_at_any_time_is_where_its_test_is_met():
    dice = np.random.default_rng(5)
    differences = dice.choice([-1.0, 0.0, 1.0], size=200, p=[0.1, 0.6, 0.3])
    low = anytime_low(differences, 0.03)
    assert 0 < low < differences.mean()
    assert anytime_p(differences, low) == pytest.approx(0.03, rel=0.01)
    # of wins and losses alone the capital has a closed form
    won, lost = 20, 5
    capital = 2**26 * betainc(lost + 1, won + 1, 0.5) * beta(won + 1, lost + 1)
    assert anytime_p([1.0] * won + [-1.0] * lost + [0.0] * 9) == pytest.approx(1 / capital, rel=1e-3)
    assert anytime_p([]) == anytime_p([-1.0] * 30) == 1.0 and anytime_low([-1.0] * 30, 0.03) < -0.7


@pytest.mark.parametrize("look", range(1, NUM_CYCLES + 1))
def test_twenty_points_on_two_hundred_tasks_are_seen_in_every_cycle(look):
    dice = np.random.default_rng(look)
    won, lost, _ = dice.multinomial(NUM_TASKS, [0.25, 0.05, 0.7], size=100).T

    seen = [promotes(int(a), int(b), look) for a, b in zip(won, lost, strict=True)]

    assert np.mean(seen) >= 0.95
