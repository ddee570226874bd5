"""The page and the plot of the proof, from the results of all runs that there are."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.proof.plan import SUBJECTS, Subject

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
LABELS = {
    "base": "base",
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "grpo": "GRPO",
    "distill": "on-policy distillation",
    "search": "search",
}
EXPLANATION = """
Every run is a whole cycle on a server of its own: demonstrations of practice tasks are imported where the base never
wins, the methods train one after the other, and the release gate plays the same held-out tasks as every policy,
greedily and without memory. Intervals are 95 % bootstrap intervals over seeds and, within a seed, over tasks.
Differences are between policies on the same tasks of the same run. Nothing was tuned on held-out tasks, and no run is
left out.
""".strip()

Cells = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Result:
    """One finished run."""

    methods: tuple[str, ...]
    seed: int
    cells: Cells
    training: Mapping[str, Any]
    verdict: str
    minutes: float
    machine: str

    @classmethod
    def read(cls, path: Path) -> tuple[str, Result]:
        """Return the name of the subject and the result."""
        found = json.loads(path.read_text(encoding="utf-8"))
        run = found["run"]
        verdict, minutes, machine = found["verdict"]["verdict"], found["minutes"], found["machine"]
        result = cls(
            tuple(run["methods"]), run["seed"], found["cells"], found["training"], verdict, minutes, str(machine)
        )
        return run["subject"], result

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all its trainings."""
        return sum(int(it.get("metrics", {}).get("num_steps", 0)) for it in self.training.values())


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and tasks, with its interval; in shares of tasks."""

    mean: float
    low: float
    high: float
    num_seeds: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} | {100 * self.low:.1f} to {100 * self.high:.1f} | {self.num_seeds}"


def estimate(of_seeds: Sequence[Sequence[float]]) -> Estimate:
    """Return the mean of values by seed and task; seeds are resampled, and tasks within each."""
    draw = np.random.default_rng(0)
    arrays = [np.asarray(values, dtype=float) for values in of_seeds]
    # Each seed's mean under resampled tasks, (num_seeds, NUM_RESAMPLES); then the mean over resampled seeds.
    within = np.stack([draw.choice(values, (NUM_RESAMPLES, len(values))).mean(axis=1) for values in arrays])
    seeds = draw.integers(len(arrays), size=(NUM_RESAMPLES, len(arrays)))
    means = np.take_along_axis(within.T, seeds, axis=1).mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(np.mean([values.mean() for values in arrays])), float(low), float(high), len(arrays))


def difference(results: Iterable[Result], ours: str, theirs: str) -> Estimate:
    """Return how much more of the same tasks one cell won than another."""
    pairs = [(result.cells[ours], result.cells[theirs]) for result in results]
    return estimate([[first[task] - second[task] for task in first if task in second] for first, second in pairs])


def render(results: Mapping[str, Sequence[Result]]) -> str:
    """Return the page: a section for each subject that has results."""
    sections = [
        render_subject(subject, results[subject.name]) for subject in SUBJECTS if results.get(subject.name)
    ] or ["No run is finished yet."]
    return "\n\n".join(["# Proof", EXPLANATION, *sections]) + "\n"


def render_subject(subject: Subject, results: Sequence[Result]) -> str:
    """Return the tables of one subject."""
    by_methods: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        by_methods[result.methods].append(result)
    lines = [f"## {subject.title}", ""]
    lines += ["| policy | won, % | 95 % interval | seeds |", "|---|---|---|---|"]
    bases = [list(result.cells["base"].values()) for result in results]
    lines.append(f"| base | {estimate(bases)} |")
    for methods, group in sorted(by_methods.items()):
        cells = [list(result.cells[methods[-1]].values()) for result in group]
        lines.append(f"| {name_sequence(methods)} | {estimate(cells)} |")
    lines += ["", "| difference | points | 95 % interval | seeds |", "|---|---|---|---|"]
    lines.append(f"| SFT over base | {difference(results, methods_of(results), 'base')} |")
    for methods, group in sorted(by_methods.items()):
        for before, after in itertools.pairwise(methods):
            lines.append(f"| {LABELS[after]} over {LABELS[before]} | {difference(group, after, before)} |")
    lines += ["", "| run | seed | base, % | then, % | steps | minutes | verdict |", "|---|---|---|---|---|---|---|"]
    for result in sorted(results, key=lambda it: (it.methods, it.seed)):
        shares = [f"{100 * share(result.cells[name]):.1f}" for name in ("base", *result.methods)]
        cells = f"{shares[0]} | {', '.join(shares[1:])} | {result.num_steps} | {result.minutes:.0f}"
        lines.append(f"| {name_sequence(result.methods)} | {result.seed} | {cells} | {result.verdict} |")
    lines += ["", "Machine: " + "; ".join(sorted({result.machine for result in results})) + "."]
    return "\n".join(lines)


def methods_of(results: Sequence[Result]) -> str:
    """Return the first method, which all runs have in common."""
    (first,) = {result.methods[0] for result in results}
    return first


def name_sequence(methods: Sequence[str]) -> str:
    return " -> ".join(LABELS[name] for name in methods)


def share(cell: Mapping[str, float]) -> float:
    return sum(cell.values()) / len(cell)


def plot(results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Draw the share of held-out tasks won, by policy and subject, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [subject for subject in SUBJECTS if results.get(subject.name)]
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, subject in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        of_subject = results[subject.name]
        bars = {"base": [list(result.cells["base"].values()) for result in of_subject]}
        for methods in sorted({result.methods for result in of_subject}):
            for name in methods:
                cells = [list(it.cells[name].values()) for it in of_subject if name in it.cells]
                bars.setdefault(name, cells)
        found = {LABELS[name]: estimate(values) for name, values in bars.items()}
        heights = [100 * it.mean for it in found.values()]
        below = [100 * (it.mean - it.low) for it in found.values()]
        above = [100 * (it.high - it.mean) for it in found.values()]
        axes.bar(list(found), heights, yerr=[below, above], capsize=4, color="#4c72b0")
        axes.set_title(subject.title, fontsize=9)
        axes.set_ylabel("held-out tasks won, %")
        axes.tick_params(axis="x", labelrotation=20, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
