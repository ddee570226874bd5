"""The arithmetic of the proof, on results that are made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bench.proof.estimate import estimate
from tests.bench.proof.page import Result, measure_difference, measure_share, plot, render
from tests.bench.proof.plan import list_runs


def as_cell(won: list[int] | np.ndarray) -> dict[str, float]:
    return {f"t{number}": float(it) for number, it in enumerate(won)}


def result(seed: int, methods: tuple[str, ...] = ("sft", "dpo"), trained=("sft", "dpo"), **won: list[int]) -> Result:
    return Result(
        methods=methods,
        seed=seed,
        cells={name: as_cell(tasks) for name, tasks in won.items()},
        trained=frozenset(trained),
        verdict="promote",
        minutes=7.0,
        stage_seconds={"sft": 60.0, "evaluate": 120.0},
        prompt_tokens=40_000,
        output_tokens=2_000,
        machine="a machine",
    )


@pytest.mark.parametrize(("seed_spread", "task_spread"), [(0.15, 0.0), (0.0, 0.3), (0.1, 0.2)])
def test_an_interval_holds_the_truth_as_often_as_it_says(seed_spread: float, task_spread: float):
    draw, held = np.random.default_rng(1), 0
    for _ in range(400):
        of_seeds, of_tasks = draw.normal(0.5, seed_spread, (3, 1)), draw.normal(0, task_spread, (1, 60))
        won = of_seeds + of_tasks + draw.normal(0, 0.3, (3, 60))
        found = estimate([as_cell(row) for row in won])
        held += found.low <= 0.5 <= found.high
    assert held / 400 > 0.92


def test_one_seed_gives_an_interval_over_tasks():
    found = estimate([as_cell([1, 0] * 50)])
    assert (found.num_seeds, found.mean) == (1, 0.5) and 0.09 < found.high - found.mean < 0.11


def test_the_interval_of_no_difference_holds_zero_and_of_a_clear_one_does_not():
    same = [result(seed, sft=[1, 0, 1, 0] * 10, dpo=[0, 1, 0, 1] * 10) for seed in (0, 1)]
    better = [result(seed, sft=[0] * 40, dpo=[1, 1, 1, 0] * 10) for seed in (0, 1)]
    none, gain = measure_difference(same, "dpo", "sft"), measure_difference(better, "dpo", "sft")
    assert none.low < 0 < none.high
    assert gain.mean == 0.75 and gain.low > 0.5


def test_sequences_that_share_a_policy_do_not_count_as_seeds():
    runs = [result(0, methods=("sft", last), sft=[1, 0] * 10) for last in ("dpo", "kto", "grpo")]
    assert measure_share(runs, "sft").num_seeds == 1


def test_no_task_won_is_not_known_exactly():
    found = measure_share([result(seed, base=[0] * 40) for seed in (0, 1)], "base")
    assert found.low == pytest.approx(found.mean) == 0 and 0.05 < found.high < 0.12


def test_a_method_whose_policy_was_not_kept_makes_no_difference_and_one_without_rows_does_not_count():
    kept = result(0, base=[0] * 20, sft=[1, 0] * 10)
    without_rows = result(1, base=[0] * 20, sft=[1, 0] * 10, trained=("sft",))
    page = render({"bfcl": [kept, without_rows]})
    assert "| DPO over SFT | 0.0 | unknown | 1 |" in page
    assert "| SFT -> DPO | 0 | 0.0 | 50.0 | kept | promote |" in page
    assert "| SFT -> DPO | 1 | 0.0 | 50.0 | too few rows | promote |" in page


def test_the_page_has_every_run_with_its_cost_and_says_where_there_is_none(tmp_path: Path):
    runs = [result(seed, base=[0] * 20, sft=[1, 0] * 10, dpo=[1] * 20) for seed in (0, 1)]
    page = render({"bfcl": runs})
    assert page.count("| SFT -> DPO | 0 |") == page.count("| SFT -> DPO | 1 |") == 1
    assert "| DPO over SFT | 50.0 |" in page and "| SFT over base | 50.0 |" in page
    assert "| SFT -> DPO | 7 | 2 | 40 | 2 |" in page
    assert "No run is finished yet." in render({})
    plot({"bfcl": runs}, tmp_path / "success.png")
    assert (tmp_path / "success.png").stat().st_size > 5_000


def test_a_stored_result_is_read_as_it_was_written(tmp_path: Path):
    stored = {
        "run": {"subject": "bfcl", "methods": ["sft", "kto"], "seed": 2},
        "cells": {"base": {"a": 0.0}, "sft": {"a": 1.0}, "kto": {"a": 1.0}},
        "training": {"sft": {}},
        "selection": None,
        "verdict": {"verdict": "reject", "reason": "", "policy": "v2"},
        "minutes": 12.0,
        "stage_seconds": {"evaluate": 3.0},
        "tokens": {"prompt": 5, "output": 6},
        "machine": {
            "cpu": "a CPU",
            "num_cores": 2,
            "memory_gib": 24,
            "python": "3.11.7",
            "date": "2026-11-30 12:07 UTC",
        },
    }
    (tmp_path / "run.json").write_text(json.dumps(stored))
    subject, read = Result.read(tmp_path / "run.json")
    assert (subject, read.methods, read.seed, read.verdict) == ("bfcl", ("sft", "kto"), 2, "reject")
    assert (read.trained, read.prompt_tokens, read.output_tokens) == ({"sft"}, 5, 6)
    assert read.machine == "2 cores of a CPU, 24 GiB, Python 3.11.7, 2026-11-30"


def test_names_of_runs_are_unique_and_every_sequence_has_one_seed_before_any_has_two():
    runs = list_runs()
    assert len({run.name for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
