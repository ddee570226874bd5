"""The arithmetic of the proof, on results that are made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bench.proof.page import Result, difference, estimate, render
from tests.bench.proof.plan import list_runs


def result(seed: int, **won: list[int]) -> Result:
    cells = {name: {f"t{number}": float(it) for number, it in enumerate(tasks)} for name, tasks in won.items()}
    return Result(("sft", "dpo"), seed, cells, {"sft": {"metrics": {"num_steps": 3}}}, "promote", 7.0, "a machine")


def test_an_interval_over_seeds_is_wider_than_one_over_their_tasks_together():
    draw = np.random.default_rng(1)
    of_seeds = [(draw.random(200) < rate).astype(float) for rate in (0.2, 0.5, 0.8)]
    spread, pooled = estimate(of_seeds), estimate([np.concatenate(of_seeds)])
    assert spread.mean == pytest.approx(pooled.mean)
    assert spread.high - spread.low > 3 * (pooled.high - pooled.low)


def test_the_interval_of_no_difference_holds_zero_and_of_a_clear_one_does_not():
    same = [result(seed, sft=[1, 0, 1, 0] * 10, dpo=[0, 1, 0, 1] * 10) for seed in (0, 1)]
    better = [result(seed, sft=[0] * 40, dpo=[1, 1, 1, 0] * 10) for seed in (0, 1)]
    none, gain = difference(same, "dpo", "sft"), difference(better, "dpo", "sft")
    assert none.low < 0 < none.high
    assert gain.mean == 0.75 and gain.low > 0.5


def test_the_page_has_every_run_and_says_where_there_is_none(tmp_path: Path):
    runs = [result(seed, base=[0] * 20, sft=[1, 0] * 10, dpo=[1] * 20) for seed in (0, 1)]
    page = render({"bfcl": runs})
    assert page.count("| SFT -> DPO | 0 |") == page.count("| SFT -> DPO | 1 |") == 1
    assert "| DPO over SFT | 50.0 |" in page and "| SFT over base | 50.0 |" in page
    assert "No run is finished yet." in render({})


def test_a_stored_result_is_read_as_it_was_written(tmp_path: Path):
    stored = {
        "run": {"subject": "bfcl", "methods": ["sft", "kto"], "seed": 2},
        "cells": {"base": {"a": 0.0}, "sft": {"a": 1.0}, "kto": {"a": 1.0}},
        "training": {},
        "verdict": {"verdict": "reject", "reason": "", "policy": "v2"},
        "minutes": 12.0,
        "machine": "one",
    }
    (tmp_path / "run.json").write_text(json.dumps(stored))
    subject, read = Result.read(tmp_path / "run.json")
    assert (subject, read.methods, read.seed, read.verdict) == ("bfcl", ("sft", "kto"), 2, "reject")


def test_names_of_runs_are_unique_and_every_sequence_has_one_seed_before_any_has_two():
    runs = list_runs()
    assert len({run.name for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
