"""Writes the release report of a cycle to its directory, the page to be read from top to bottom.

Three files appear: `report.json` (everything), `report.md` (the page), `success.png` (success by policy with
intervals). A section of the page without content is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from optimizer.cycle.artifacts import Critiques, Selection, TrainedAdapter, to_json
from optimizer.cycle.report import Evaluation, GateFigures, InsightFigures, Report
from optimizer.cycle.stages import Method
from optimizer.evaluation.cells import CellSummary
from optimizer.evaluation.comparisons import ComparedCells, Saving
from optimizer.evaluation.decision import Guard

COLOURS = {"off": "#4c72b0", "on": "#dd8452"}
LISTED_TASKS = 40


def write_report(directory: Path, report: Report, evaluation: Evaluation, *, keep_earlier: bool = False) -> Path:
    """Write the three files, the plot only where something was played; return the path of the page.

    With `keep_earlier`, existing files get a number instead of being replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # a decision after the cycle had closed: the report of the cycle stays readable
    if keep_earlier:
        _set_aside(directory)
    (directory / "report.json").write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
    if any(cell.num_episodes for cell in report.cells.values()):
        played = [*evaluation.policies, *([evaluation.control] if evaluation.control is not None else [])]
        plot_success(report.cells, {policy.name: policy.title for policy in played}, directory / "success.png")
    page = directory / "report.md"
    page.write_text(render_markdown(report, evaluation.methods), encoding="utf-8")
    return page


def _set_aside(directory: Path) -> None:
    number = 1 + len(list(directory.glob("report-*.json")))
    for name in ("report.json", "report.md", "success.png"):
        path = directory / name
        if path.exists():
            path.rename(path.with_stem(f"{path.stem}-{number}"))


def render_markdown(report: Report, methods: Sequence[Method]) -> str:
    """Return the page of a report; the data and the trainings of each method are described by the method itself."""
    verdict, num_tasks = report.verdict, report.verdict.paired.num_tasks
    cells = {name: cell for name, cell in report.cells.items() if cell.num_episodes}
    head = [
        f"# Cycle {report.cycle}: {verdict.decision}",
        f"Policy v{verdict.candidate.policy} against v{verdict.incumbent.policy} on {num_tasks} held-out tasks "
        f"{_played_by(report)}: {verdict.reason}.",
        "![Success by stage](success.png)" if cells else "",
    ]
    sections = (
        ("Success by stage", [_render_cells(cells)]),
        ("On the same tasks", [_render_comparisons([each for each in report.comparisons if each.num_tasks])]),
        ("Guards", [_render_guards(verdict.guards) if num_tasks else ""]),
        ("The gate", [_render_gate(report.gate)]),
        ("Memory replaced by weights", [_render_saving(report.saving) if report.saving else ""]),
        (
            "Tasks that changed",
            [_list_changed("Won", verdict.tasks_won), _list_changed("Lost", verdict.tasks_lost)],
        ),
        (
            "Data",
            [_as_sentence(report.pool), _as_sentence(report.methods.reason), _render_data(report, methods)],
        ),
        ("Training", [_render_training(report.training)]),
        ("Time", [_render_time(report.stage_seconds)]),
        (
            "Insights",
            [_render_critiques(report.critiques) if report.critiques else "", _render_insights(report.insights)],
        ),
        (
            "Lineage",
            [" <- ".join(f"{ancestor.policy} ({ancestor.note or 'no note'})" for ancestor in report.lineage)],
        ),
    )
    parts = head + [part for title, texts in sections if any(texts) for part in (f"## {title}", *texts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _render_cells(cells: Mapping[str, CellSummary]) -> str:
    return _table(
        [
            "",
            "policy",
            "success (pass@1)",
            "95 % interval",
            "pass@tries",
            "model calls",
            "prompt tokens / call",
            "output tokens / call",
            "invalid tool calls / call",
            "broken",
            "cut",
        ],
        [
            [
                name,
                f"v{cell.policy}",
                f"**{cell.success:.1%}** ({cell.num_successes}/{cell.num_episodes})",
                f"{cell.low:.1%} to {cell.high:.1%}",
                "" if cell.pass_at_tries is None else f"{cell.pass_at_tries:.1%} (pass@{cell.num_tries})",
                f"{cell.turns_per_episode:.1f}",
                f"{cell.prompt_tokens_per_turn:.0f}",
                f"{cell.output_tokens_per_turn:.1f}",
                f"{cell.invalid_per_turn:.3f}",
                f"{cell.broken_share:.0%}",
                f"{cell.truncated_share:.0%}",
            ]
            for name, cell in cells.items()
        ],
    )


def _render_comparisons(comparisons: Sequence[ComparedCells]) -> str:
    return _table(
        ["comparison", "difference", "95 % interval", "relative", "won / lost", "p (exact)"],
        [
            [
                c.title,
                f"{c.difference:+.1%}",
                f"{c.low:+.1%} to {c.high:+.1%}",
                "" if c.relative_gain is None else f"{c.relative_gain:+.1%}",
                f"{c.num_won} / {c.num_lost}",
                f"{c.p_value:.2g}",
            ]
            for c in comparisons
        ],
    )


def _render_guards(guards: Sequence[Guard]) -> str:
    rows = []
    for guard in guards:
        measure = "ratio" if guard.is_ratio else "difference"
        rows.append(
            [
                guard.name,
                f"{guard.candidate:.3g}",
                f"{guard.incumbent:.3g}",
                "unknown" if guard.low is None else f"{measure} {guard.low:.3g} to {guard.high:.3g}",
                f"{guard.limit:.3g}",
                "rejects" if guard.is_hard else "names the price",
                _yes(guard.is_kept),
            ]
        )
    return _table(["guard", "candidate", "incumbent", "95 % interval", "limit", "beyond it", "kept"], rows)


def _render_gate(gate: GateFigures) -> str:
    lines = []
    spent = f"{gate.alpha_spent:.4f} of {gate.alpha_budget:.4f} of the incumbent's error budget is spent."
    if gate.look is None:
        lines.append(f"No test was made, and nothing spent: {spent}")
    else:
        lines.append(f"Look {gate.look} at this incumbent, which spends {gate.alpha:.4f}: {spent}")
    if (play := gate.play) is not None and play.temperature != play.serving_temperature:
        lines.append(f"**Played at temperature {play.temperature:g}; users get {play.serving_temperature:g}.**")
    for one in gate.regressions:
        lines.append(
            f"Learned from {one.environment} too: {one.difference:+.1%} on {one.num_tasks} of its held-out "
            f"tasks (95 % interval {one.low:+.1%} to {one.high:+.1%})."
        )
    if (sealed := gate.sealed) is not None:
        lines.append(
            f"Sealed block, played after the decision: {sealed.success:.1%} of {sealed.num_tasks} tasks "
            f"(95 % interval {sealed.low:.1%} to {sealed.high:.1%}). It was touched {gate.sealed_touches} "
            f"time{'s' if gate.sealed_touches != 1 else ''}, this one included."
        )
    return "\n\n".join(lines)


def _played_by(report: Report) -> str:
    play = report.gate.play
    if play is None:
        return "as clients played and rewarded them"
    tries = "once" if play.num_tries == 1 else f"{play.num_tries} times"
    how = "greedily" if play.temperature == 0 else f"at temperature {play.temperature:g}"
    return f"of {report.environment}, each played {tries}, {how}, through the rollout that serves"


def _render_saving(saving: Saving) -> str:
    return (
        f"Prompt tokens per model call: {saving.prompt_tokens_per_turn_before:.0f} for the base with memory, "
        f"{saving.prompt_tokens_per_turn_after:.0f} for {saving.final} without: {saving.share:.0%} less "
        f"({saving.tokens_per_turn:.0f} tokens a call, 95 % interval {saving.low:.0f} to {saving.high:.0f}), "
        f"at {saving.success_before:.1%} success before and {saving.success_after:.1%} after."
    )


def _render_data(report: Report, methods: Sequence[Method]) -> str:
    built = [(method, report.rows[method.rows]) for method in methods]
    data = [(method, rows) for method, rows in built if rows is not None]
    paragraphs = [paragraph for method, rows in data for paragraph in method.describe(to_json(rows))]
    paragraphs += [_render_teachers(method.rows, rows.teachers) for method, rows in data]
    before = ""
    for method in methods:
        if method.name in report.training:
            before = method.title
        elif before:
            paragraphs.append(f"Too few {method.rows} for {method.title}: it kept the {before} policy as it was.")
    if report.verifier is not None:
        paragraphs.append(report.verifier["description"])
    if report.selection is not None:
        paragraphs.append(_render_selection(report.selection))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _render_selection(selection: Selection) -> str:
    played = ", ".join(f"v{version} {won}" for version, won in selection.num_won.items())
    return (
        f"Of {selection.num_tasks} practice tasks that nothing was trained on, so many were won: {played}. "
        f"v{selection.chosen} became the candidate."
    )


def _render_teachers(title: str, teachers: Sequence[Mapping[str, object]]) -> str:
    """Return a table of the rows of each teacher; a preference counts for the teachers of both its sides."""
    rows = [
        [
            repr(teacher["tenant"]) if teacher["tenant"] else "default",
            str(teacher["teacher"]),
            f"{teacher['key_name'] or ''} ({teacher['key_id']})" if teacher["key_id"] else "none",
            str(teacher["user"] or "unnamed"),
            str(teacher["num_rows"]),
        ]
        for teacher in teachers
    ]
    return _table(["tenant", f"{title} taught by", "key", "user (hash)", "rows"], rows)


def _render_training(training: Mapping[str, TrainedAdapter]) -> str:
    rows = []
    for name, trained in training.items():
        metrics, settings = trained.metrics, trained.settings
        shown = ", ".join(f"{key} {value}" for key, value in metrics.items() if "/" in key)
        recipe = f"r {settings['lora_rank']}, lr {settings['learning_rate']:g}, "
        recipe += f"{settings['epochs']:g} epochs, batch {settings['batch_size']}"
        rows.append(
            [f"{name} (v{trained.policy})", recipe, f"{metrics['num_steps']}", f"{metrics['seconds']:.0f}", shown]
        )
    return _table(["", "recipe", "steps", "seconds", "first and last fifth"], rows)


def _render_time(stage_seconds: Mapping[str, float]) -> str:
    total = sum(stage_seconds.values())
    rows = [[stage, f"{seconds / 60:.1f}", f"{seconds / total:.0%}"] for stage, seconds in stage_seconds.items()]
    return _table(["stage", "minutes", "share"], rows)


def _render_critiques(critiques: Critiques) -> str:
    text = f"A model was asked {critiques.num_asked} times for lessons; {critiques.num_failed} times in vain"
    if critiques.num_skipped:
        text += f", and {critiques.num_skipped} more times it was not asked because it had failed again and again"
    return text + (f". The first failure: {critiques.first_failure}" if critiques.first_failure else ".")


def _render_insights(insights: Sequence[InsightFigures]) -> str:
    rows = [
        [
            i.text,
            str(i.strength),
            f"{i.wins} / {i.losses}",
            f"{i.wins_otherwise} / {i.losses_otherwise}",
        ]
        for i in insights
    ]
    return _table(["insight", "strength", "won / lost with it", "won / lost otherwise"], rows)


def _list_changed(title: str, tasks: Sequence[str]) -> str:
    if not tasks:
        return ""
    more = f" and {len(tasks) - LISTED_TASKS} more" if len(tasks) > LISTED_TASKS else ""
    return f"{title} now ({len(tasks)}): {', '.join(tasks[:LISTED_TASKS])}{more}"


def _as_sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    # insights and task names are free text: an unescaped bar would shift the columns
    cells = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def plot_success(cells: Mapping[str, CellSummary], titles: Mapping[str, str], path: Path) -> None:
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
        heights = [100 * cell.success for _, cell in shown]
        # never below zero: at 0 % and 100 % rounding would put an end of the interval inside the bar
        below = [max(0.0, 100 * (cell.success - cell.low)) for _, cell in shown]
        above = [max(0.0, 100 * (cell.high - cell.success)) for _, cell in shown]
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
