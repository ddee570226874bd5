"""The page of a release report shows all measurements, and leaves out sections without any."""

from __future__ import annotations

from typing import Any

import pytest

from optimizer.cycle.methods import list_methods
from optimizer.cycle.report import PlayedPolicy, list_comparisons
from optimizer.cycle.report_page import render_markdown

CELL = {
    "policy": 1,
    "num_episodes": 0,
    "num_successes": 0,
    "num_tries": 1,
    "success": 0.0,
    "low": 0.0,
    "high": 1.0,
    "pass_at_tries": None,
    "turns_per_episode": 0.0,
    "prompt_tokens_per_turn": 0.0,
    "output_tokens_per_turn": 0.0,
    "invalid_per_turn": 0.0,
    "broken_share": 0.0,
    "truncated_share": 0.0,
}
GUARD = {
    "name": "turns",
    "candidate": 0.0,
    "incumbent": 0.0,
    "low": None,
    "high": None,
    "limit": 1.25,
    "is_ratio": True,
}
COMPARISON = {
    "title": "SFT against base, memory off",
    "num_tasks": 0,
    "difference": 0.0,
    "low": -1.0,
    "high": 1.0,
    "relative_gain": None,
    "num_won": 0,
    "num_lost": 0,
    "p_value": 1.0,
}


def a_report(num_tasks: int) -> dict[str, Any]:
    """Return the report of a cycle that learned from one correction, compared on `num_tasks` tasks."""
    cell = CELL | {"num_episodes": num_tasks}
    return {
        "cycle": "cyc_1",
        "environment": "",
        "pool": "weights learn from live traffic only",
        "methods": {"names": ["sft", "dpo"], "reason": ""},
        "verdict": {
            "decision": "uninformative",
            "reason": "too few tasks were played by both",
            "candidate": {"policy": 1},
            "incumbent": {"policy": 0},
            "paired": {"num_tasks": num_tasks},
            "guards": [GUARD | {"is_hard": False, "is_kept": True}],
            "tasks_won": [f"task-{number}" for number in range(num_tasks)],
            "tasks_lost": [],
        },
        "gate": {"alpha_spent": 0.0, "alpha_budget": 0.05, "look": None, "regressions": [], "sealed": None},
        "cells": {"candidate-off": cell, "incumbent-off": cell},
        "comparisons": [COMPARISON | {"num_tasks": num_tasks}],
        "saving": None,
        "demonstrations": {"num_rows": 1, "num_tasks": 1, "num_with_memory": 0, "tally": {}, "teachers": []},
        "preferences": {},
        "training": {},
        "stage_seconds": {},
        "verifier": None,
        "insights": [],
        "critiques": None,
        "lineage": [{"policy": "v1", "note": "SFT"}],
    }


def test_sections_about_nothing_are_left_out():
    page = render_markdown(a_report(0), list_methods(("sft", "dpo")))
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["The gate", "Data", "Lineage"]
    for empty in ("None.", "none", "Not measured", "| ", "success.png", "0 preferences", "\n\n\n"):
        assert empty not in page, empty
    assert "too few tasks were played by both" in page and "1 demonstrations of 1 tasks" in page


@pytest.mark.parametrize("title", ["Success by stage", "On the same tasks", "Guards", "Tasks that changed"])
def test_what_was_played_is_on_the_page(title: str):
    page = render_markdown(a_report(2), list_methods(("sft", "dpo")))
    assert f"## {title}\n" in page and "Won now (2): task-0, task-1" in page and "Lost now" not in page


def test_the_last_training_is_compared_with_the_control():
    policies = [PlayedPolicy("base", "base", 0), PlayedPolicy("sft", "SFT", 1), PlayedPolicy("dpo", "SFT+DPO", 2)]
    control = PlayedPolicy("control", "SFT on all episodes", 3)
    more = set(list_comparisons(policies, control)) - set(list_comparisons(policies))
    assert more == {
        ("dpo-off", "control-off", "SFT+DPO against SFT on all episodes, memory off"),
        ("dpo-on", "control-on", "SFT+DPO against SFT on all episodes, memory on"),
    }


def test_each_training_is_compared_with_the_one_before_and_with_the_base():
    policies = [PlayedPolicy("base", "base", 0), PlayedPolicy("sft", "SFT", 1), PlayedPolicy("dpo", "SFT+DPO", 2)]
    assert {title: (first, second) for first, second, title in list_comparisons(policies)} == {
        "memory on against off, base": ("base-on", "base-off"),
        "SFT against base, memory off": ("sft-off", "base-off"),
        "memory on against off, SFT": ("sft-on", "sft-off"),
        "SFT+DPO against SFT, memory off": ("dpo-off", "sft-off"),
        "SFT+DPO against base, memory off": ("dpo-off", "base-off"),
        "SFT+DPO without memory against base with memory": ("dpo-off", "base-on"),
        "SFT without memory against base with memory": ("sft-off", "base-on"),
        "SFT+DPO against SFT, memory on": ("dpo-on", "sft-on"),
        "memory on against off, SFT+DPO": ("dpo-on", "dpo-off"),
    }
