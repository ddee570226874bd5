"""The page of a release report shows all measurements, and leaves out sections without any."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optimizer.config import EvaluationConfig
from optimizer.cycle.artifacts import RowsSummary
from optimizer.cycle.methods import list_methods
from optimizer.cycle.report import Ancestor, ChosenMethods, GateFigures, PlayFigures, Report
from optimizer.cycle.report_page import render_markdown
from optimizer.evaluation.cells import Cell, CellResult, HeldOutEpisode
from optimizer.evaluation.comparisons import PlayedPolicy, compare_cells, list_comparisons, measure_saving
from optimizer.evaluation.decision import decide

POLICIES = [PlayedPolicy("base", "base", 0), PlayedPolicy("sft", "SFT", 1)]


def play(cell: Cell, num_tasks: int, *, is_success: bool) -> CellResult:
    """Return a cell in which every task was won, or none was."""
    episode = HeldOutEpisode("", "trj_1", is_success, False, False, 3, 300, 30, 0)
    return CellResult(cell, [replace(episode, task=f"task-{number}") for number in range(num_tasks)])


def a_report(num_tasks: int) -> Report:
    """Return the report of a cycle that learned from one correction, compared on `num_tasks` tasks."""
    ours = play(Cell("sft-off", 1, False), num_tasks, is_success=True)
    theirs = play(Cell("base-off", 0, False), num_tasks, is_success=False)
    cells = {result.cell.name: result for result in (ours, theirs)}
    return Report(
        cycle="cyc_1",
        opened_at="2026-11-30T12:00:00+00:00",
        environment="",
        pool="weights learn from live traffic only",
        methods=ChosenMethods(["sft", "dpo"], ""),
        verdict=decide(ours, theirs, EvaluationConfig()),
        gate=GateFigures(look=None, alpha=0.0, alpha_spent=0.0, alpha_budget=0.05),
        cells={name: result.summary() for name, result in cells.items()},
        comparisons=compare_cells(cells, POLICIES),
        saving=None,
        rows={"demonstrations": RowsSummary(num_rows=1, num_tasks=1, num_with_memory=0), "preferences": None},
        verifier=None,
        selection=None,
        training={},
        insights=[],
        critiques=None,
        stage_seconds={},
        lineage=[Ancestor("v1", "SFT", None)],
        settings={},
    )


def test_sections_about_nothing_are_left_out():
    page = render_markdown(a_report(0), list_methods(("sft", "dpo")))
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["The gate", "Data", "Lineage"]
    for empty in ("None.", "none", "Not measured", "| ", "success.png", "0 preferences", "\n\n\n"):
        assert empty not in page, empty
    assert "0 tasks were played by both, 30 are needed" in page and "1 demonstrations of 1 tasks" in page


@pytest.mark.parametrize("title", ["Success by stage", "On the same tasks", "Guards", "Tasks that changed"])
def test_what_was_played_is_on_the_page(title: str):
    page = render_markdown(a_report(2), list_methods(("sft", "dpo")))
    assert f"## {title}\n" in page and "Won now (2): task-0, task-1" in page and "Lost now" not in page


def test_the_stored_report_is_flat_where_releases_before_were():
    stored = a_report(2).to_json()

    (compared,) = stored["comparisons"]
    assert (compared["first"], compared["second"], compared["num_won"]) == ("sft-off", "base-off", 2)
    assert stored["demonstrations"]["num_rows"] == 1 and stored["demonstrations"]["trajectory_ids"] == 0
    assert stored["demonstrations"]["tally"] == {} and stored["preferences"] == {} and "rows" not in stored
    assert stored["verdict"]["decision"] == "uninformative" and "is_kept" in stored["verdict"]["guards"][0]


def test_the_gate_of_clients_tries_has_no_figures_of_play():
    report = a_report(2)
    assert "temperature" not in report.to_json()["gate"] and report.to_json()["gate"]["look"] is None
    played = replace(report.gate, play=PlayFigures(0.0, 0.7, num_tries=1, held_out_offset=0))
    assert replace(report, gate=played).to_json()["gate"]["serving_temperature"] == 0.7
    page = render_markdown(replace(report, gate=played), list_methods(("sft", "dpo")))
    assert "**Played at temperature 0; users get 0.7.**" in page


def test_the_prompt_tokens_that_weights_save_are_those_of_the_last_policy_without_memory():
    before = play(Cell("base-on", 0, True), 20, is_success=True)
    after = play(Cell("sft-off", 1, False), 20, is_success=True)
    after = CellResult(after.cell, [replace(each, prompt_tokens=180) for each in after.played])

    saving = measure_saving({"base-on": before, "sft-off": after}, POLICIES)

    assert saving is not None
    assert (saving.prompt_tokens_per_turn_before, saving.prompt_tokens_per_turn_after) == (100, 60)
    assert (saving.share, saving.tokens_per_turn, saving.final) == (pytest.approx(0.4), 40, "sft-off")
    assert saving.low == saving.high == 40  # every task saves as much
    assert measure_saving({"base-on": before}, POLICIES) is None
    assert measure_saving({"sft-off": after}, POLICIES) is None


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
