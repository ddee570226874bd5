"""Renders the release report of a cycle as Markdown, to be read from top to bottom.

The input is the report as `optimizer.cycle.report` writes it to `report.json`. A section without content is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimizer.cycle.stages import Method

LISTED_TASKS = 40


def render_markdown(report: dict[str, Any], methods: Sequence[Method]) -> str:
    """Return the page of a report; the data and the trainings of each method are described by the method itself."""
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
        ("Memory replaced by weights", [_render_saving(report["saving"]) if report["saving"] else ""]),
        (
            "Tasks that changed",
            [_list_changed("Won", verdict["tasks_won"]), _list_changed("Lost", verdict["tasks_lost"])],
        ),
        (
            "Data",
            [_as_sentence(report["pool"]), _as_sentence(report["methods"]["reason"]), _render_data(report, methods)],
        ),
        ("Training", [_render_training(report["training"])]),
        ("Time", [_render_time(report["stage_seconds"])]),
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
        measure = "ratio" if guard["is_ratio"] else "difference"
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
    # a comparison by the log has none of the figures of play
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
        f"Prompt tokens per model call: {saving['prompt_tokens_per_turn_before']:.0f} for the base with memory, "
        f"{saving['prompt_tokens_per_turn_after']:.0f} for {saving['final']} without: {saving['share']:.0%} less "
        f"({saving['tokens_per_turn']:.0f} tokens a call, 95 % interval {saving['low']:.0f} to {saving['high']:.0f}), "
        f"at {saving['success_before']:.1%} success before and {saving['success_after']:.1%} after."
    )


def _render_data(report: dict[str, Any], methods: Sequence[Method]) -> str:
    data = [(method, report[method.rows]) for method in methods if report[method.rows]]
    paragraphs = [paragraph for method, rows in data for paragraph in method.describe(rows)]
    paragraphs += [_render_teachers(method.rows, rows) for method, rows in data]
    before = ""
    for method in methods:
        if method.name in report["training"]:
            before = method.title
        elif before:
            paragraphs.append(f"Too few {method.rows} for {method.title}: it kept the {before} policy as it was.")
    if report["verifier"]:
        paragraphs.append(report["verifier"]["description"])
    if report.get("selection"):
        paragraphs.append(_render_selection(report["selection"]))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _render_selection(selection: dict[str, Any]) -> str:
    played = ", ".join(f"v{version} {won}" for version, won in selection["num_won"].items())
    return (
        f"Of {selection['num_tasks']} practice tasks that nothing was trained on, so many were won: {played}. "
        f"v{selection['chosen']} became the candidate."
    )


def _render_teachers(title: str, data: dict[str, Any]) -> str:
    """Return a table of the rows of each teacher; a preference counts for the teachers of both its sides."""
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
    for name, trained in training.items():
        metrics, settings = trained["metrics"], trained["settings"]
        shown = ", ".join(f"{key} {value}" for key, value in metrics.items() if "/" in key)
        recipe = f"r {settings['lora_rank']}, lr {settings['learning_rate']:g}, "
        recipe += f"{settings['epochs']:g} epochs, batch {settings['batch_size']}"
        rows.append(
            [f"{name} (v{trained['policy']})", recipe, f"{metrics['num_steps']}", f"{metrics['seconds']:.0f}", shown]
        )
    return _table(["", "recipe", "steps", "seconds", "first and last fifth"], rows)


def _render_time(stage_seconds: dict[str, float]) -> str:
    total = sum(stage_seconds.values())
    rows = [[stage, f"{seconds / 60:.1f}", f"{seconds / total:.0%}"] for stage, seconds in stage_seconds.items()]
    return _table(["stage", "minutes", "share"], rows)


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


def _list_changed(title: str, tasks: list[str]) -> str:
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
