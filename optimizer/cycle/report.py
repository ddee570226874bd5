"""Writes the release report of a cycle: what was learned from, what it became, and the numbers behind the verdict.

Refuses to decide anything: it shows what stages kept and what the gate said. Three files appear in the cycle's report
directory: `report.json` (everything), `report.md` (to be read), `success.png` (success by stage with intervals).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memory.scopes import EVERYBODY
from optimizer.cycle.context import CycleContext
from optimizer.evaluation.comparison import CellResult, EpisodeSummary, Verdict, compare_pairs, pair_tasks, share_won
from optimizer.evaluation.intervals import bootstrap_mean

COMPARISONS = (
    ("base-on", "base-off", "memory on against off, base"),
    ("sft-off", "base-off", "SFT against base, memory off"),
    ("sft-on", "sft-off", "memory on against off, SFT"),
    ("dpo-off", "sft-off", "SFT+DPO against SFT, memory off"),
    ("dpo-off", "base-off", "SFT+DPO against base, memory off"),
    ("dpo-off", "base-on", "SFT+DPO without memory against base with memory"),
    ("sft-off", "base-on", "SFT without memory against base with memory"),
    ("dpo-on", "sft-on", "SFT+DPO against SFT, memory on"),
    ("dpo-on", "dpo-off", "memory on against off, SFT+DPO"),
)
COLOURS = {"off": "#4c72b0", "on": "#dd8452"}
LISTED_TASKS = 40


def write_report(
    context: CycleContext,
    cells: dict[str, CellResult],
    verdict: Verdict,
    gate: dict[str, Any],
    *,
    keep_earlier: bool = False,
) -> Path:
    """Write the three files, the plot only where something was played; return the path of the Markdown one. `gate` is
    what the gate says of itself. With `keep_earlier`, files that are there get a number instead of being replaced."""
    report = build_report(context, cells, verdict, gate)
    directory = context.reports
    directory.mkdir(parents=True, exist_ok=True)
    if keep_earlier:
        _set_aside(directory)
    (directory / "report.json").write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")
    if any(cell["num_episodes"] for cell in report["cells"].values()):
        plot_success(report["cells"], directory / "success.png")
    markdown = directory / "report.md"
    markdown.write_text(render_markdown(report), encoding="utf-8")
    return markdown


def _set_aside(directory: Path) -> None:
    number = 1 + len(list(directory.glob("report-*.json")))
    for name in ("report.json", "report.md", "success.png"):
        path = directory / name
        if path.exists():
            path.rename(path.with_stem(f"{path.stem}-{number}"))


def build_report(
    context: CycleContext, cells: dict[str, CellResult], verdict: Verdict, gate: dict[str, Any]
) -> dict[str, Any]:
    """Return everything the report says, as plain values."""
    artifacts, cycle = context.artifacts, context.cycle
    candidate = artifacts["candidate"]
    return {
        "cycle": cycle.id,
        "opened_at": cycle.created_at.isoformat(),
        "environment": context.config.environment,
        "pool": artifacts.get("pool", ""),
        "verdict": verdict.to_json(),
        "gate": gate,
        "cells": {name: result.summary() for name, result in cells.items()},
        "comparisons": compare_cells(cells),
        "saving": measure_saving(cells),
        "demonstrations": _without_ids(artifacts["demonstrations"]),
        "preferences": artifacts.get("preferences", {}),
        "selection": artifacts.get("selection"),
        "training": {kind: artifacts[kind] for kind in ("sft", "dpo") if kind in artifacts},
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
        "critiques": artifacts.get("critiques"),
        "lineage": [
            {"policy": policy.name, "note": policy.note, "adapter": policy.adapter_path}
            for policy in context.memory.policies.lineage(candidate)
        ],
        "settings": cycle.settings,
    }


def _without_ids(demonstrations: dict[str, Any]) -> dict[str, Any]:
    ids = demonstrations["trajectory_ids"]
    return {**demonstrations, "trajectory_ids": len(ids)}


def compare_cells(cells: dict[str, CellResult]) -> list[dict[str, Any]]:
    """Return each comparison that both cells were played for, task by task."""
    compared = []
    for first, second, title in COMPARISONS:
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


def measure_saving(cells: dict[str, CellResult]) -> dict[str, Any] | None:
    """Return what the words cost before they became weights: base with memory against the final policy without; None
    where clients played, who are not asked for that."""
    final = cells.get("dpo-off") or cells.get("sft-off")
    if "base-on" not in cells or final is None:
        return None
    before, after = cells["base-on"].per_turn("prompt_tokens"), final.per_turn("prompt_tokens")
    differences = [
        _prompt_tokens_per_turn(pair.theirs) - _prompt_tokens_per_turn(pair.ours)
        for pair in pair_tasks(final, cells["base-on"])
    ]
    mean, low, high = bootstrap_mean(differences)
    return {
        "prompt_tokens_per_turn_before": before,
        "prompt_tokens_per_turn_after": after,
        "share": 1 - after / before if before else 0.0,
        "tokens_per_turn": mean,
        "low": low,
        "high": high,
        "success_before": cells["base-on"].success,
        "success_after": final.success,
        "final": final.cell.name,
    }


def _prompt_tokens_per_turn(tries: list[EpisodeSummary]) -> float:
    return sum(episode.prompt_tokens for episode in tries) / max(1, sum(episode.num_turns for episode in tries))


def render_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page to be read from top to bottom; a section about nothing is left out."""
    verdict = report["verdict"]
    paired = verdict["paired"]
    was_played = paired["num_tasks"] > 0
    cells = {name: cell for name, cell in report["cells"].items() if cell["num_episodes"]}
    comparisons = [compared for compared in report["comparisons"] if compared["num_tasks"]]
    head = [
        f"# Cycle {report['cycle']}: {verdict['decision']}",
        f"Policy v{verdict['candidate']['policy']} against v{verdict['incumbent']['policy']} on {paired['num_tasks']} "
        f"held-out tasks {_played_by(report)}: {verdict['reason']}.",
        "![Success by stage](success.png)" if cells else "",
    ]
    sections = (
        ("Success by stage", [_render_cells(cells)]),
        ("On the same tasks", [_render_comparisons(comparisons)]),
        ("Guards", [_render_guards(verdict["guards"]) if was_played else ""]),
        ("The gate", [_render_gate(report["gate"])]),
        ("Words that became weights", [_render_saving(report["saving"]) if report["saving"] else ""]),
        (
            "Tasks that changed",
            [_list_changed("Won", verdict["tasks_won"]), _list_changed("Lost", verdict["tasks_lost"])],
        ),
        ("Data", [f"{report['pool'].capitalize()}." if report["pool"] else "", _render_data(report)]),
        ("Training", [_render_training(report["training"])]),
        (
            "Insights",
            [
                _render_critiques(report["critiques"]) if report["critiques"] else "",
                _render_insights(report["insights"]),
            ],
        ),
        (
            "Lineage",
            [" <- ".join(f"{policy['policy']} ({policy['note'] or 'no note'})" for policy in report["lineage"])],
        ),
    )
    parts = head + [part for title, texts in sections if any(texts) for part in (f"## {title}", *texts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _render_cells(cells: dict[str, dict[str, Any]]) -> str:
    return _table(
        [
            "",
            "policy",
            "success (pass@1)",
            "95 % interval",
            "pass@tries",
            "turns",
            "prompt tokens / turn",
            "output tokens / turn",
            "invalid calls / turn",
            "broken",
            "cut",
        ],
        [
            [
                name,
                f"v{cell['policy']}",
                f"**{cell['success']:.1%}** ({cell['num_successes']}/{cell['num_episodes']})",
                f"{cell['low']:.1%} to {cell['high']:.1%}",
                "" if cell["pass_at_tries"] is None else f"{cell['pass_at_tries']:.1%} (pass@{cell['num_tries']})",
                f"{cell['turns_per_episode']:.1f}",
                f"{cell['prompt_tokens_per_turn']:.0f}",
                f"{cell['output_tokens_per_turn']:.1f}",
                f"{cell['invalid_per_turn']:.3f}",
                f"{cell['broken_share']:.0%}",
                f"{cell['truncated_share']:.0%}",
            ]
            for name, cell in cells.items()
        ],
    )


def _render_comparisons(comparisons: list[dict[str, Any]]) -> str:
    return _table(
        ["comparison", "difference", "95 % interval", "relative", "won / lost", "p (exact)"],
        [
            [
                c["title"],
                f"{c['difference']:+.1%}",
                f"{c['low']:+.1%} to {c['high']:+.1%}",
                "" if c["relative_gain"] is None else f"{c['relative_gain']:+.1%}",
                f"{c['num_won']} / {c['num_lost']}",
                f"{c['p_value']:.2g}",
            ]
            for c in comparisons
        ],
    )


def _render_guards(guards: list[dict[str, Any]]) -> str:
    rows = []
    for guard in guards:
        measure = "difference" if guard["is_hard"] else "ratio"
        is_known = guard["low"] is not None
        rows.append(
            [
                guard["name"],
                f"{guard['candidate']:.3g}",
                f"{guard['incumbent']:.3g}",
                f"{measure} {guard['low']:.3g} to {guard['high']:.3g}" if is_known else "unknown",
                f"{guard['limit']:.3g}",
                "rejects" if guard["is_hard"] else "names the price",
                _yes(guard["is_kept"]),
            ]
        )
    return _table(["guard", "candidate", "incumbent", "95 % interval", "limit", "beyond it", "kept"], rows)


def _render_gate(gate: dict[str, Any]) -> str:
    lines = []
    spent = f"{gate['alpha_spent']:.4f} of {gate['alpha_budget']:.4f} of the incumbent's error budget is spent."
    if gate["look"] is None:
        lines.append(f"No test was made, and nothing spent: {spent}")
    else:
        lines.append(f"Look {gate['look']} at this incumbent, which spends {gate['alpha']:.4f}: {spent}")
    if "temperature" in gate and gate["temperature"] != gate["serving_temperature"]:
        lines.append(f"**Played at temperature {gate['temperature']:g}; users get {gate['serving_temperature']:g}.**")
    for one in gate["regressions"]:
        lines.append(
            f"Learned from {one['environment']} too: {one['difference']:+.1%} on {one['num_tasks']} of its held-out "
            f"tasks (95 % interval {one['low']:+.1%} to {one['high']:+.1%})."
        )
    if (sealed := gate["sealed"]) is not None:
        lines.append(
            f"Sealed block, played after the decision: {sealed['success']:.1%} of {sealed['num_tasks']} tasks "
            f"(95 % interval {sealed['low']:.1%} to {sealed['high']:.1%}). It was touched {gate['sealed_touches']} "
            f"time{'s' if gate['sealed_touches'] != 1 else ''}, this one included."
        )
    return "\n\n".join(lines)


def _played_by(report: dict[str, Any]) -> str:
    if not report["environment"]:
        return "as clients played and rewarded them"
    gate = report["gate"]
    tries = "once" if gate["num_tries"] == 1 else f"{gate['num_tries']} times"
    how = "greedily" if gate["temperature"] == 0 else f"at temperature {gate['temperature']:g}"
    return f"of {report['environment']}, each played {tries}, {how}, through the rollout that serves"


def _render_saving(saving: dict[str, Any]) -> str:
    return (
        f"Prompt tokens per turn: {saving['prompt_tokens_per_turn_before']:.0f} for the base with memory, "
        f"{saving['prompt_tokens_per_turn_after']:.0f} for {saving['final']} without: {saving['share']:.0%} less "
        f"({saving['tokens_per_turn']:.0f} tokens a turn, 95 % interval {saving['low']:.0f} to {saving['high']:.0f}), "
        f"at {saving['success_before']:.1%} success before and {saving['success_after']:.1%} after."
    )


def _render_data(report: dict[str, Any]) -> str:
    demonstrations, preferences = report["demonstrations"], report["preferences"]
    lines = [
        f"{demonstrations['num_rows']} demonstrations of {demonstrations['num_tasks']} tasks, "
        f"{demonstrations['num_with_memory']} of them with their memory segment ({_tally(demonstrations['tally'])}).",
        _render_trained_share(demonstrations),
        f"{preferences['num_rows']} preferences of {preferences['num_tasks']} tasks ({_tally(preferences['tally'])})."
        if preferences
        else "",
    ]
    lines += [
        _render_teachers(title, of) for title, of in (("demonstrations", demonstrations), ("preferences", preferences))
    ]
    if "dpo" not in report["training"]:
        lines.append("Too few preferences for DPO: the SFT policy itself was the candidate.")
    if report.get("selection"):
        lines.append(_render_selection(report["selection"]))
    return "\n\n".join(line for line in lines if line)


def _render_selection(selection: dict[str, Any]) -> str:
    played = ", ".join(f"v{version} {won}" for version, won in selection["num_won"].items())
    return (
        f"Of {selection['num_tasks']} practice tasks that nothing was trained on, so many were won: {played}. "
        f"v{selection['chosen']} became the candidate."
    )


def _render_trained_share(demonstrations: dict[str, Any]) -> str:
    if "trained_share" not in demonstrations:  # rows built by an older version, in a cycle that was taken up again
        return ""
    num_forks = demonstrations["tally"].get("fork", 0)
    return (
        f"{demonstrations['trained_share']:.1%} of the agent's own tokens in the usable episodes have a loss "
        f"({demonstrations['trained_tokens']} of {demonstrations['own_tokens']}). {num_forks} model calls began a row "
        "of their own, because the chat template wrote an earlier reply differently than it was sampled."
    )


def _render_teachers(title: str, data: dict[str, Any]) -> str:
    """Return a table of who taught how much; a preference counts for whoever judged either of its sides."""
    rows = [
        [
            repr(teacher["tenant"]) if teacher["tenant"] else "default",
            teacher["teacher"],
            f"{teacher['key_name'] or ''} ({teacher['key_id']})" if teacher["key_id"] else "none",
            teacher["user"] or "unnamed",
            str(teacher["num_rows"]),
        ]
        for teacher in data.get("teachers", [])
    ]
    return _table(["tenant", f"{title} taught by", "key", "user (hash)", "rows"], rows)


def _render_training(training: dict[str, Any]) -> str:
    rows = []
    for kind, made in training.items():
        metrics, settings = made["metrics"], made["settings"]
        shown = ", ".join(f"{key} {value}" for key, value in metrics.items() if "/" in key)
        recipe = f"r {settings['lora_rank']}, lr {settings['learning_rate']:g}, "
        recipe += f"{settings['epochs']:g} epochs, batch {settings['batch_size']}"
        rows.append(
            [f"{kind} (v{made['policy']})", recipe, f"{metrics['num_steps']}", f"{metrics['seconds']:.0f}", shown]
        )
    return _table(["", "recipe", "steps", "seconds", "first and last fifth"], rows)


def _render_critiques(critiques: dict[str, Any]) -> str:
    text = f"A model was asked {critiques['num_asked']} times for lessons; {critiques['num_failed']} times in vain"
    if critiques["num_skipped"]:
        text += f", and {critiques['num_skipped']} more times it was not asked because it had failed again and again"
    return text + (f". The first failure: {critiques['first_failure']}" if critiques["first_failure"] else ".")


def _render_insights(insights: list[dict[str, Any]]) -> str:
    rows = [
        [
            i["text"],
            str(i["strength"]),
            f"{i['wins']} / {i['losses']}",
            f"{i['wins_otherwise']} / {i['losses_otherwise']}",
        ]
        for i in insights
    ]
    return _table(["insight", "strength", "won / lost with it", "won / lost otherwise"], rows)


def _tally(tally: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(tally.items(), key=lambda item: -item[1]) if count)


def _list_changed(title: str, tasks: list[str]) -> str:
    if not tasks:
        return ""
    more = f" and {len(tasks) - LISTED_TASKS} more" if len(tasks) > LISTED_TASKS else ""
    return f"{title} now ({len(tasks)}): {', '.join(tasks[:LISTED_TASKS])}{more}"


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    cells = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def plot_success(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw success by stage, memory off and on side by side, with Wilson's intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(name.partition("-")[0] for name in cells))
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, memory in ((-0.18, "off"), (0.18, "on")):
        shown = [
            (position, cells[f"{stage}-{memory}"])
            for position, stage in enumerate(stages)
            if f"{stage}-{memory}" in cells
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
    titles = {"base": "base", "sft": "SFT", "dpo": "SFT + DPO"}
    axes.set_xticks(range(len(stages)), [titles.get(stage, stage) for stage in stages])
    axes.set_ylabel("held-out tasks won, %")
    axes.set_ylim(bottom=0)
    axes.set_title("Success by stage, with 95 % intervals")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
