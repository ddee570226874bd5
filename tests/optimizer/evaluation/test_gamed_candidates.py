"""The gate, simulated: no candidate is promoted that only looks better, or loses what poisoned rows would cost it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from optimizer.config import EvaluationConfig
from optimizer.evaluation.cells import Cell, CellResult, HeldOutEpisode
from optimizer.evaluation.decision import Decision, decide
from tests.optimizer.played import EPISODE

NUM_TASKS, SUCCESS, DISCORDANCE = 200, 0.4, 0.02
SHORT, FULL = 40, 2_000
CONFIGS = {
    "only better": EvaluationConfig(),
    "no worse and cheaper": EvaluationConfig(noninferiority_margin=0.02),
    "never dearer": EvaluationConfig(allow_dearer=False),
}
Dice = np.random.Generator
BY_CHANCE = dict.fromkeys(["verbosity", "0.1 % of the rows poisoned", "1 % of the rows poisoned"], 0.03)
"""Games with little or no harm are promoted by chance, at most at the error rate of a first comparison."""

INCUMBENT = Cell("incumbent", 0, False)
CANDIDATE = Cell("candidate", 1, False)


def play_incumbent(dice: Dice) -> list[HeldOutEpisode]:
    won = dice.random(NUM_TASKS) < SUCCESS
    return [replace(EPISODE, task=str(number), is_success=bool(it)) for number, it in enumerate(won)]


def noisy(played: list[HeldOutEpisode], dice: Dice) -> list[HeldOutEpisode]:
    """Flip a few tasks either way, as another sample would."""
    flipped = dice.random(NUM_TASKS) < DISCORDANCE
    return [replace(it, is_success=it.is_success != bool(flip)) for it, flip in zip(played, flipped, strict=True)]


def losing(played: list[HeldOutEpisode], share: float, dice: Dice, **changes: object) -> list[HeldOutEpisode]:
    """Lose this share of all tasks, out of those that were won, and apply `changes` to them."""
    lost = dice.random(NUM_TASKS) < share / SUCCESS
    return [
        replace(it, is_success=False, **changes) if it.is_success and gone else it
        for it, gone in zip(played, lost, strict=True)
    ]


def all_with(played: list[HeldOutEpisode], **changes: object) -> list[HeldOutEpisode]:
    return [replace(it, **changes) for it in played]


def winning(played: list[HeldOutEpisode], share: float, dice: Dice, **changes: object) -> list[HeldOutEpisode]:
    """Win this share of the lost tasks as well."""
    gained = dice.random(NUM_TASKS) < share
    return [
        replace(it, is_success=it.is_success or bool(more), **changes) for it, more in zip(played, gained, strict=True)
    ]


GAMES: dict[str, Callable[[list[HeldOutEpisode], Dice], list[HeldOutEpisode]]] = {
    "verbosity": lambda played, dice: all_with(played, output_tokens=800),
    "format: some answers are of no use": lambda played, dice: losing(played, 0.03, dice),
    "broken tool calls beside more success": lambda played, dice: winning(played, 0.15, dice, num_invalid_tool_calls=2),
    "a clarifying question in the place of an answer": lambda played, dice: losing(
        played, 0.1, dice, num_calls=1, prompt_tokens=200, output_tokens=15
    ),
    "episodes cut short, and so cheaper": lambda played, dice: losing(
        all_with(played, num_calls=4, prompt_tokens=1500), 0.06, dice, is_truncated=True
    ),
    "0.1 % of the rows poisoned": lambda played, dice: losing(played, 0.001, dice),
    "1 % of the rows poisoned": lambda played, dice: losing(played, 0.01, dice),
    "5 % of the rows poisoned": lambda played, dice: losing(played, 0.05, dice),
}


@pytest.mark.parametrize("num_runs", [SHORT, pytest.param(FULL, marks=pytest.mark.slow)], ids=["short", "full"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", GAMES)
def test_a_candidate_that_is_no_better_is_not_promoted_for_what_it_shows(
    name: str, config: EvaluationConfig, num_runs: int
):
    dice, promoted = np.random.default_rng(11), []
    for _ in range(num_runs):
        incumbent = play_incumbent(dice)
        candidate = GAMES[name](noisy(incumbent, dice), dice)
        verdict = decide(CellResult(CANDIDATE, candidate), CellResult(INCUMBENT, incumbent), config)
        promoted += [verdict.reason] * (verdict.decision is Decision.PROMOTE)
    assert len(promoted) <= BY_CHANCE.get(name, 0.0) * num_runs, promoted


def test_the_same_gate_promotes_what_really_wins_more():
    dice = np.random.default_rng(11)
    incumbent = play_incumbent(dice)
    candidate = winning(noisy(incumbent, dice), 0.15, dice)
    verdict = decide(CellResult(CANDIDATE, candidate), CellResult(INCUMBENT, incumbent), CONFIGS["only better"])
    assert verdict.decision is Decision.PROMOTE


@pytest.mark.parametrize("who", ["candidate", "incumbent", "both"])
@pytest.mark.parametrize("share", [0.06, 0.3, 1.0])
def test_a_storm_of_timeouts_on_either_side_is_uninformative(who: str, share: float):
    dice = np.random.default_rng(3)
    incumbent = play_incumbent(dice)
    sides = {"candidate": winning(incumbent, 0.3, dice), "incumbent": incumbent}
    for name, played in sides.items():
        if who in (name, "both"):
            num_broken = int(share * NUM_TASKS)
            sides[name] = [replace(it, is_broken=number < num_broken) for number, it in enumerate(played)]
    verdict = decide(
        CellResult(CANDIDATE, sides["candidate"]), CellResult(INCUMBENT, sides["incumbent"]), CONFIGS["only better"]
    )
    assert verdict.decision is Decision.UNINFORMATIVE


def test_a_probe_that_both_were_coached_for_is_a_ceiling_and_uninformative():
    """If memory shows the answers, both policies win nearly all tasks, whatever they learned."""
    dice = np.random.default_rng(5)
    coached = all_with(play_incumbent(dice), is_success=True)
    candidate = [replace(it, is_success=number != 0) for number, it in enumerate(coached)]
    verdict = decide(CellResult(CANDIDATE, candidate), CellResult(INCUMBENT, coached), CONFIGS["only better"])
    assert verdict.decision is Decision.UNINFORMATIVE
