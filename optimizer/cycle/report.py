"""Writes the release report of a cycle: the data, the trainings, and the numbers behind the verdict.

Three files appear in the cycle's report directory: `report.json` (everything), `report.md` (to be read), `success.png`
(success by policy with intervals). Nothing is decided here; methods and policies are reported as they are passed in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.scopes import EVERYBODY
from memory.teaching import TeacherKind
from optimizer.cycle.artifacts import to_json
from optimizer.cycle.context import CycleContext
from optimizer.cycle.report_page import render_markdown
from optimizer.cycle.stages import Method
from optimizer.evaluation.cells import CellResult, HeldOutEpisode, compare_pairs, pair_tasks, share_won
from optimizer.evaluation.decision import Verdict
from optimizer.evaluation.intervals import bootstrap_mean
from optimizer.verifier.report import HOME, read_newest

COLOURS = {"off": "#4c72b0", "on": "#dd8452"}


@dataclass(frozen=True)
class PlayedPolicy:
    """One policy of the evaluation; its cells are `<name>-off` and `<name>-on`."""

    name: str
    title: str
    version: int


@dataclass(frozen=True)
class Evaluation:
    """Everything that the release gate hands over to be reported."""

    cells: Mapping[str, CellResult]
    """By the name of the cell."""
    policies: Sequence[PlayedPolicy]
    """In the order of their trainings, the base first; empty where only the two contestants were played."""
    methods: Sequence[Method]
    verdict: Verdict
    gate: dict[str, Any]
    """The figures of the gate itself: its look, and the error budget that is spent."""
    control: PlayedPolicy | None = None


def write_report(context: CycleContext, evaluation: Evaluation, *, keep_earlier: bool = False) -> Path:
    """Write the three files, the plot only where something was played; return the path of the Markdown one.

    With `keep_earlier`, existing files get a number instead of being replaced.
    """
    report = build_report(context, evaluation)
    directory = context.reports
    directory.mkdir(parents=True, exist_ok=True)
    # a decision after the cycle had closed: the report of the cycle stays readable
    if keep_earlier:
        _set_aside(directory)
    # default=str: a value of an unexpected type becomes its text instead of failing the cycle at its end
    (directory / "report.json").write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")
    if any(cell["num_episodes"] for cell in report["cells"].values()):
        played = [*evaluation.policies, *([evaluation.control] if evaluation.control is not None else [])]
        titles = {policy.name: policy.title for policy in played}
        plot_success(report["cells"], titles, directory / "success.png")
    markdown = directory / "report.md"
    markdown.write_text(render_markdown(report, evaluation.methods), encoding="utf-8")
    return markdown


def _set_aside(directory: Path) -> None:
    number = 1 + len(list(directory.glob("report-*.json")))
    for name in ("report.json", "report.md", "success.png"):
        path = directory / name
        if path.exists():
            path.rename(path.with_stem(f"{path.stem}-{number}"))


def build_report(context: CycleContext, evaluation: Evaluation) -> dict[str, Any]:
    """Return the whole report as plain values; the keys are a stored format."""
    artifacts, methods = context.artifacts, evaluation.methods
    kinds = {teacher["teacher"] for summary in artifacts.rows.values() for teacher in summary.teachers}
    rows = {method.rows: artifacts.rows.get(method.rows) for method in methods}
    return {
        "cycle": context.cycle_id,
        "opened_at": context.opened_at.isoformat(),
        "environment": context.config.environment,
        "pool": artifacts.pool,
        "methods": {"names": artifacts.methods, "reason": artifacts.methods_reason},
        "verdict": evaluation.verdict.to_json(),
        "gate": evaluation.gate,
        "cells": {name: result.summary() for name, result in evaluation.cells.items()},
        "comparisons": compare_cells(evaluation.cells, evaluation.policies, evaluation.control),
        "saving": measure_saving(evaluation.cells, evaluation.policies),
        **{name: {} if summary is None else _without_ids(to_json(summary)) for name, summary in rows.items()},
        "verifier": read_newest(context.memory.data_dir / HOME) if TeacherKind.VERIFIER in kinds else None,
        "selection": to_json(artifacts.selection),
        "training": {
            method.name: to_json(artifacts.trained[method.name])
            for method in methods
            if method.name in artifacts.trained
        },
        "insights": [
            {
                "kind": insight.kind,
                "text": insight.text,
                "strength": insight.strength,
                "wins": insight.wins,
                "losses": insight.losses,
                "wins_otherwise": insight.wins_otherwise,
                "losses_otherwise": insight.losses_otherwise,
            }
            for insight in context.memory.insights.active(context.config.environment, scope=EVERYBODY)
        ],
        "critiques": to_json(artifacts.critiques),
        "stage_seconds": artifacts.stage_seconds,
        "lineage": [
            {"policy": policy.name, "note": policy.note, "adapter": policy.adapter_path}
            for policy in context.memory.policies.lineage(artifacts.candidate_version)
        ],
        "settings": context.settings,
    }


def _without_ids(rows: dict[str, Any]) -> dict[str, Any]:
    return {**rows, "trajectory_ids": len(rows["trajectory_ids"])}


def list_comparisons(
    policies: Sequence[PlayedPolicy], control: PlayedPolicy | None = None
) -> Iterator[tuple[str, str, str]]:
    """Yield (first cell, second cell, title): each training against the one before and against the base, the last
    against the control, and the effect of memory on each policy."""
    # the base must come first; an empty list has none (compare_cells asks first)
    base, *trained = policies
    for before, after in zip(policies, trained, strict=False):
        yield f"{after.name}-off", f"{before.name}-off", f"{after.title} against {before.title}, memory off"
        if before is not base:
            yield f"{after.name}-on", f"{before.name}-on", f"{after.title} against {before.title}, memory on"
    if control is not None:
        for memory in ("off", "on"):
            title = f"{policies[-1].title} against {control.title}, memory {memory}"
            yield f"{policies[-1].name}-{memory}", f"{control.name}-{memory}", title
    # the first training is compared with the base above, as its predecessor
    for policy in trained[1:]:
        yield f"{policy.name}-off", f"{base.name}-off", f"{policy.title} against {base.title}, memory off"
    for policy in trained:
        title = f"{policy.title} without memory against {base.title} with memory"
        yield f"{policy.name}-off", f"{base.name}-on", title
    for policy in policies:
        yield f"{policy.name}-on", f"{policy.name}-off", f"memory on against off, {policy.title}"


def compare_cells(
    cells: Mapping[str, CellResult], policies: Sequence[PlayedPolicy], control: PlayedPolicy | None = None
) -> list[dict[str, Any]]:
    """Return each comparison that both cells were played for, task by task."""
    compared = []
    for first, second, title in list_comparisons(policies, control) if policies else ():
        if first not in cells or second not in cells:
            continue
        pairs = pair_tasks(cells[first], cells[second])
        gains = {pair.task: share_won(pair.ours) - share_won(pair.theirs) for pair in pairs}
        compared.append(
            {
                "title": title,
                "first": first,
                "second": second,
                **vars(compare_pairs(pairs)),
                "relative_gain": _relative_gain(cells[first].success, cells[second].success),
                "tasks_won": [task for task, gain in gains.items() if gain > 0],
                "tasks_lost": [task for task, gain in gains.items() if gain < 0],
            }
        )
    return compared


def _relative_gain(first: float, second: float) -> float | None:
    return first / second - 1 if second else None


def measure_saving(cells: Mapping[str, CellResult], policies: Sequence[PlayedPolicy]) -> dict[str, Any] | None:
    """Compare prompt tokens of the base with memory and of the last policy without: the cost of insights before and
    after they became weights. None where these cells were not played."""
    played = [policy for policy in policies[1:] if f"{policy.name}-off" in cells]
    if not played or f"{policies[0].name}-on" not in cells:
        return None
    before, after = cells[f"{policies[0].name}-on"], cells[f"{played[-1].name}-off"]
    tokens_before, tokens_after = before.per_call("prompt_tokens"), after.per_call("prompt_tokens")
    differences = [
        _prompt_tokens_per_call(pair.theirs) - _prompt_tokens_per_call(pair.ours) for pair in pair_tasks(after, before)
    ]
    mean, low, high = bootstrap_mean(differences)
    return {
        "prompt_tokens_per_turn_before": tokens_before,
        "prompt_tokens_per_turn_after": tokens_after,
        "share": 1 - tokens_after / tokens_before if tokens_before else 0.0,
        "tokens_per_turn": mean,
        "low": low,
        "high": high,
        "success_before": before.success,
        "success_after": after.success,
        "final": after.cell.name,
    }


def _prompt_tokens_per_call(tries: Sequence[HeldOutEpisode]) -> float:
    return sum(episode.prompt_tokens for episode in tries) / max(1, sum(episode.num_calls for episode in tries))


def plot_success(cells: dict[str, dict[str, Any]], titles: Mapping[str, str], path: Path) -> None:
    """Draw success by policy, memory off and on side by side, with 95 % intervals.

    `titles`: names of policies -> titles; a policy without one is labelled by its name.
    """
    # imported late: matplotlib takes a second, and most processes draw nothing
    # not pyplot: it keeps figures in global state, and this runs in a worker thread
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # up to the first hyphen, so names of policies have none
    names = list(dict.fromkeys(name.partition("-")[0] for name in cells))
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, memory in ((-0.18, "off"), (0.18, "on")):
        shown = [
            (position, cells[f"{name}-{memory}"]) for position, name in enumerate(names) if f"{name}-{memory}" in cells
        ]
        heights = [100 * cell["success"] for _, cell in shown]
        # never below zero: at 0 % and 100 % rounding would put an end of the interval inside the bar
        below = [max(0.0, 100 * (cell["success"] - cell["low"])) for _, cell in shown]
        above = [max(0.0, 100 * (cell["high"] - cell["success"])) for _, cell in shown]
        bars = axes.bar(
            [position + offset for position, _ in shown],
            heights,
            0.34,
            yerr=[below, above],
            capsize=4,
            color=COLOURS[memory],
            label=f"memory {memory}",
        )
        axes.bar_label(bars, fmt="%.1f %%", padding=2, fontsize=8)
    axes.set_xticks(range(len(names)), [titles.get(name, name) for name in names])
    axes.set_ylabel("held-out tasks won, %")
    axes.set_ylim(bottom=0)
    axes.set_title("Success by stage, with 95 % intervals")
    # beside the axes: looking for the best place in them takes as long as a second, and then matplotlib warns
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
