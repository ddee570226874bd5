"""Benchmarks are run by hand; these tests check that each can still be started."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))
def test_a_benchmark_finds_what_it_imports(name: str):
    importlib.import_module(f"tests.bench.{name}")
