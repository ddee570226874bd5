"""The page and the plot of the proof, from the results of all runs that there are."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np

from memory.statistics import wilson_interval
from tests.bench.proof.estimate import Cell, Estimate, estimate
from tests.bench.proof.plan import SUBJECTS, Subject

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
Every run is a whole cycle on a server of its own: where the base never wins, demonstrations are imported of practice
tasks that the cycle does not play; the methods train one after the other, and the release gate plays the same held-out
tasks with every policy, greedily and without memory. After its training a cycle keeps the policy that won most of 64
practice tasks that nothing was trained on; where that is the policy before, the method counts as a difference of 0, and
the run says "kept". A method that found too few rows was not tried, and counts for nothing but its line.

Intervals are 95 % intervals over seeds and tasks, both of them random (an analysis of variance with crossed effects and
Satterthwaite's degrees of freedom); with one seed they are over tasks alone. Policies that several sequences of methods
share are averaged within a seed first. Differences are between policies on the same tasks of the same run. Nothing was
tuned on held-out tasks, and no run is left out; one whose choice turned out to be made on demonstrated tasks is in the
[log](log.md).
""".strip()


@dataclass(frozen=True)
class Result:
    """One finished run."""

    methods: tuple[str, ...]
    seed: int
    cells: Mapping[str, Cell]
    """By the name of the policy: "base", or the method that trained it last."""
    trained: frozenset[str]
    """The methods that had enough rows."""
    verdict: str
    minutes: float
    stage_seconds: Mapping[str, float]
    prompt_tokens: int
    output_tokens: int
    machine: str

    @classmethod
    def read(cls, path: Path) -> tuple[str, Result]:
        """Return the name of the subject and the result."""
        found = json.loads(path.read_text(encoding="utf-8"))
        run, tokens = found["run"], found["tokens"]
        result = cls(
            methods=tuple(run["methods"]),
            seed=run["seed"],
            cells=found["cells"],
            trained=frozenset(found["training"]),
            verdict=found["verdict"]["verdict"],
            minutes=found["minutes"],
            stage_seconds=found["stage_seconds"],
            prompt_tokens=tokens["prompt"],
            output_tokens=tokens["output"],
            machine="{num_cores} cores of {cpu}, {memory_gib} GiB, Python {python}, {date:.10}".format(
                **found["machine"]
            ),
        )
        return run["subject"], result

    def cell(self, name: str) -> Cell:
        """Return what the policy won that the cycle had after a method: its own, or the one that it kept."""
        stages = ("base", *self.methods)
        return next(self.cells[it] for it in reversed(stages[: stages.index(name) + 1]) if it in self.cells)

    def describe(self, name: str) -> str:
        """Return the percentage of a cell, or why a method has none of its own."""
        if name in self.cells:
            won = self.cells[name].values()
            return f"{100 * sum(won) / len(won):.1f}"
        return "kept" if name in self.trained else "too few rows"


def by_seed(results: Iterable[Result], measure: Callable[[Result], Cell]) -> list[Cell]:
    """Return one cell for each seed: what is measured of its runs, averaged task by task."""
    of_seeds: dict[int, list[Cell]] = defaultdict(list)
    for result in results:
        of_seeds[result.seed].append(measure(result))
    return [
        {task: mean(cell[task] for cell in cells) for task in cells[0] if all(task in cell for cell in cells)}
        for _, cells in sorted(of_seeds.items())
    ]


def measure_share(results: Sequence[Result], name: str) -> Estimate:
    """Return how much of the tasks the policy after a method won."""
    found = estimate(by_seed(results, lambda result: result.cell(name)))
    if found.low < found.high:
        return found
    # none or all were won: the variance is 0, and what is known comes from the number of tasks
    num_tasks = len(results[0].cell(name))
    low, high = wilson_interval(round(found.mean * num_tasks), num_tasks)
    return replace(found, low=low, high=high)


def measure_difference(results: Iterable[Result], ours: str, theirs: str) -> Estimate:
    """Return how much more of the same tasks the policy after one method won than the one after another."""

    def compare(result: Result) -> Cell:
        first, second = result.cell(ours), result.cell(theirs)
        return {task: first[task] - second[task] for task in first if task in second}

    return estimate(by_seed(results, compare))


def render(results: Mapping[str, Sequence[Result]]) -> str:
    """Return the page: a section for each subject that has results."""
    sections = [
        render_subject(subject, results[subject.name]) for subject in SUBJECTS if results.get(subject.name)
    ] or ["No run is finished yet."]
    return "\n\n".join(["# Proof", EXPLANATION, *sections]) + "\n"


def render_subject(subject: Subject, results: Sequence[Result]) -> str:
    """Return the tables of one subject."""
    sequences = group_by_methods(results)
    first = results[0].methods[0]  # all sequences begin alike
    shares = [("base", measure_share(results, "base")), (LABELS[first], measure_share(results, first))]
    differences = [(f"{LABELS[first]} over base", measure_difference(results, first, "base"))]
    costs = []
    for methods, group in sequences.items():
        tried = [result for result in group if result.trained.issuperset(methods)]
        for before, after in itertools.pairwise(methods if tried else ()):
            shares.append((name_sequence(methods), measure_share(tried, after)))
            differences.append((f"{LABELS[after]} over {LABELS[before]}", measure_difference(tried, after, before)))
        costs.append((name_sequence(methods), *describe_cost(group)))
    runs = [
        (name_sequence(it.methods), it.seed, *(it.describe(name) for name in ("base", *it.methods)), it.verdict)
        for it in sorted(results, key=lambda it: (it.methods, it.seed))
    ]
    tables = [
        table(("policy", "won, %", "95 % interval", "seeds"), shares),
        table(("difference", "points", "95 % interval", "seeds"), differences),
        table(("run", "seed", "base, %", "first, %", "second, %", "verdict"), runs),
        table(COSTS, costs),
    ]
    machines = "Machine: " + "; ".join(sorted({result.machine for result in results})) + "."
    return "\n\n".join([f"## {subject.title}", *tables, machines])


COSTS = ("mean of a run", "minutes", "of these the gate", "prompt tokens, thousands", "output tokens, thousands")


def describe_cost(group: Sequence[Result]) -> list[str]:
    """Return the means of a sequence's runs under the titles `COSTS`."""
    gate = [it.stage_seconds.get("evaluate", 0.0) / 60 for it in group]
    tokens = [[it.prompt_tokens / 1000 for it in group], [it.output_tokens / 1000 for it in group]]
    return [f"{mean(values):.0f}" for values in ([it.minutes for it in group], gate, *tokens)]


def group_by_methods(results: Iterable[Result]) -> dict[tuple[str, ...], list[Result]]:
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda it: it.methods):
        groups[result.methods].append(result)
    return dict(groups)


def name_sequence(methods: Sequence[str]) -> str:
    return " -> ".join(LABELS[name] for name in methods)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plot(results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Draw the share of held-out tasks won, by policy and subject, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [subject for subject in SUBJECTS if results.get(subject.name)]
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, subject in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        found = {LABELS["base"]: measure_share(results[subject.name], "base")}
        for methods, group in group_by_methods(results[subject.name]).items():
            found.setdefault(LABELS[methods[0]], measure_share(results[subject.name], methods[0]))
            if tried := [result for result in group if result.trained.issuperset(methods)]:
                found[LABELS[methods[-1]]] = measure_share(tried, methods[-1])
        heights = [100 * it.mean for it in found.values()]
        # never below zero: rounding would put an end of a narrow interval inside the bar
        below = [max(0.0, 100 * (it.mean - it.low)) for it in found.values()]
        above = [max(0.0, 100 * (it.high - it.mean)) for it in found.values()]
        axes.bar(list(found), heights, yerr=[below, above], capsize=4, color="#4c72b0")
        axes.set_title(subject.title, fontsize=9)
        axes.set_ylabel("held-out tasks won, %")
        axes.tick_params(axis="x", labelrotation=20, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
