"""How answers look in a terminal: tables, progress, an episode to be read like a play.

Refuses to ask for anything: everything here is given the JSON of an answer. Text from data is never read as markup.
"""

from __future__ import annotations

import shutil
import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markdown import Markdown
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from runtime.cli.printable import printable

STAGE_COLOURS = {
    "active": "bold green",
    "candidate": "yellow",
    "canary": "yellow",
    "rejected": "red",
    "failed": "red",
    "cancelled": "yellow",
    "error": "red",
}


def table_of(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; a column that starts with `#` is right-aligned."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix("#"), justify="right" if column.startswith("#") else "left")
    return table


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def coloured(stage: str) -> Text:
    return Text(stage, style=STAGE_COLOURS.get(stage, ""))


def first_line(text: str | None, *, limit: int = 200) -> Text:
    """Return the beginning of a text on one line, to be cut where its column ends."""
    return Text(" ".join((text or "").split())[:limit], no_wrap=True, overflow="ellipsis")


def play_progress(console: Console) -> Progress:
    """Return the progress bar of `play`."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def play_summary(played: dict[str, Any]) -> RenderableType:
    """Return the small table at the end of `play`."""
    num_tasks, num_turns = max(1, played["num_tasks"]), max(1, played["num_turns"])
    table = table_of(
        "policy", "memory", "#tasks", "#success", "#95 % interval", "#turns", "#prompt tokens", "#output tokens"
    )
    table.add_row(
        str(played["policy"]),
        "on" if played["use_memory"] else "off",
        str(played["num_tasks"]),
        Text(share(played["success"]), style="bold"),
        f"{100 * played['low']:.1f} .. {100 * played['high']:.1f} %",
        f"{played['num_turns'] / num_tasks:.1f}",
        f"{played['prompt_tokens'] / num_turns:.0f} a turn",
        f"{played['output_tokens'] / num_turns:.0f} a turn",
    )
    rate = f"{played['seconds']:.1f} s, {played['num_tasks'] / max(played['seconds'], 1e-9):.1f} episodes/s"
    invalid = f"{played['num_invalid_tool_calls']} invalid tool calls"
    notes = f"{rate}, {invalid}" + (f", {played['num_failed']} episodes failed" if played["num_failed"] else "")
    return Group(table, Text(notes, style="dim"))


class CycleLines:
    """One line per stage of a cycle: live where there is a terminal, printed as they end where there is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: str | None = None
        self._began = time.monotonic()
        self._message = ""
        self._status = console.status("waiting for the cycle") if console.is_terminal else None

    def __enter__(self) -> CycleLines:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def update(self, cycle: dict[str, Any]) -> None:
        """Show where the cycle is."""
        cycle = printable(cycle)
        stage, progress = cycle["stage"], cycle["progress"] or {}
        if stage != self._stage:
            self._end_stage(stage)
        done, total = progress.get("done"), progress.get("total")
        counted = f"{done}/{total} " if total else ""
        self._message = escape(f"{counted}{progress.get('message', '')}".strip())
        if self._status and stage not in ("completed", "error"):
            self._status.update(f"[bold]{stage:12}[/] {self._message}")

    def _end_stage(self, stage: str) -> None:
        if self._stage is not None:
            seconds = time.monotonic() - self._began
            self._console.print(f"  [bold]{self._stage:12}[/] {seconds:6.0f} s  {self._message}", highlight=False)
        elif not self._status:
            self._console.print(f"  {stage} ...")
        self._stage, self._began, self._message = stage, time.monotonic(), ""


def needs_table(needs: dict[str, Any]) -> RenderableType:
    """Return what a cycle needs, what is there, and how to mend what is missing."""
    table = table_of("", "what the cycle needs", "#needed", "#there", "#by playing, at most")
    notes: list[RenderableType] = []
    for need in needs["data"]:
        mark = Text("ok", style="green")
        if need["num_missing"]:
            mark = Text("!!", style="bold red") if need["is_required"] else Text("!", style="yellow")
            notes.append(Text(f"{need['name']}: {need['detail']}. {need['num_missing']} missing: {need['mend']}."))
        counts = [str(need[name]) for name in ("needed", "available", "playable")]
        table.add_row(mark, Text(need["name"]), *counts)
    return Group(table, *notes)


def cycle_outcome(outcome: dict[str, Any]) -> RenderableType:
    """Return the report and the verdict, the verdict alone where there is no report, nothing where there is neither."""
    if outcome["verdict"] is None and not outcome["markdown"]:
        return ""
    line = Text(f"verdict: {outcome['verdict']}", style="bold")
    line.append(f"; candidate {outcome['policy']}, active {outcome['active']}", style="not bold")
    return Group(Markdown(outcome["markdown"]), Text(), line) if outcome["markdown"] else line


def report_page(outcome: dict[str, Any]) -> RenderableType:
    return Markdown(outcome["markdown"]) if outcome["markdown"] else ""


def policies_table(listed: dict[str, Any]) -> Table:
    table = table_of("policy", "stage", "parent", "adapter", "verdict", "made", "note")
    for policy in listed["data"]:
        verdict = policy["verdict"] or {}
        table.add_row(
            policy["name"],
            coloured(policy["stage"]),
            policy["parent"] or "-",
            (policy["adapter_path"] or "none").rsplit("/", 1)[-1],
            str(verdict.get("decision", "-")),
            policy["created_at"][:16].replace("T", " "),
            Text(policy["note"]),
        )
    return table


def keys_table(listed: dict[str, Any]) -> Table:
    table = table_of("id", "name", "tenant", "scopes", "#req/min", "#tok/min", "last used")
    table.columns[0].no_wrap, table.columns[0].min_width = True, 32  # ids are there to be copied
    for row in listed["data"]:
        limits = [str(row[name] or "-") for name in ("requests_per_minute", "tokens_per_minute")]
        used = "revoked" if row["revoked_at"] else (row["last_used_at"] or "never")[:10]
        table.add_row(row["id"], Text(row["name"]), row["tenant"] or "-", " ".join(row["scopes"]), *limits, used)
    return table


def insights_table(listed: dict[str, Any]) -> Table:
    table = table_of("id", "environment", "kind", "#strength", "#won", "#lost", "shown to", "insight")
    table.columns[0].no_wrap, table.columns[0].min_width = True, 28
    for row in listed["data"]:
        counts = str(row["strength"]), str(row["wins"]), str(row["losses"])
        table.add_row(row["id"], row["environment"], row["kind"], *counts, _whom(row), Text(row["text"]))
    return table


def exemplars_table(listed: dict[str, Any]) -> Table:
    table = table_of("id", "environment", "kind", "#steps", "shown to", "as it is shown")
    table.columns[0].no_wrap, table.columns[0].min_width = True, 28
    for row in listed["data"]:
        text = Text(row["text"])
        table.add_row(row["id"], row["environment"] or "-", row["kind"], str(row["num_steps"]), _whom(row), text)
    return table


def _whom(row: dict[str, Any]) -> Text:
    return Text(row["user_id"] if row["shown_to"] == "user" else row["shown_to"])


WIDE_COLUMNS = 110


def is_wide() -> bool:
    return shutil.get_terminal_size().columns >= WIDE_COLUMNS


def one_line_each(*columns: str, flexible: str) -> Table:
    """Return an empty table whose rows keep to one line; where that is too long, the `flexible` column gives way."""
    table = table_of(*columns)
    for column in table.columns:
        column.no_wrap = column.header != flexible
    table.columns[0].min_width = 32  # ids are there to be copied
    return table


def trajectories_table(listed: dict[str, Any]) -> Table:
    columns = ["id", "policy", "asked", "stage", "#reward", *(("split", "#steps", "#tokens") if is_wide() else ())]
    table = one_line_each(*columns, flexible="asked")
    for row in listed["data"]:
        question = f"{row['environment']} {row['task']}" if row["environment"] else row["question"]
        more = (row["split"], str(row["num_steps"]), str(row["prompt_tokens"] + row["output_tokens"]))
        table.add_row(
            row["id"],
            row["policy"],
            first_line(question),
            coloured(row["stage"]),
            "-" if row["reward"] is None else f"{row['reward']:.2f}",
            *(more if is_wide() else ()),
        )
    return table


def cycles_table(listed: dict[str, Any]) -> Table:
    columns = ["id", "stage", "verdict", "policy", *(("begun",) if is_wide() else ()), "reason"]
    table = one_line_each(*columns, flexible="reason")
    for row in listed["data"]:
        verdict, candidate = row["verdict"] or {}, row["artifacts"].get("candidate")
        table.add_row(
            row["id"],
            coloured(row["stage"]),
            verdict.get("decision", "-"),
            "-" if candidate is None else f"v{candidate}",
            *((row["created_at"][:16].replace("T", " "),) if is_wide() else ()),
            first_line(row["error"] or verdict.get("reason", "")),
        )
    return table


def documents_table(listed: dict[str, Any]) -> Table:
    table = table_of("id", "added", "title")
    table.columns[0].no_wrap, table.columns[0].min_width = True, 32
    for row in listed["data"]:
        table.add_row(row["id"], row["created_at"][:10], Text(row["title"]))
    return table


def passages_found(listed: dict[str, Any]) -> RenderableType:
    if not listed["data"]:
        return Text("no passage of a document answers this")
    parts: list[RenderableType] = []
    for row in listed["data"]:
        parts.append(Text.assemble((row["title"], "bold"), f"  {row['score']:.2f}  ", (row["document_id"], "dim")))
        parts.append(Padding(Text(row["text"]), (0, 0, 1, 2)))
    return Group(*parts)


def trajectory_story(one: dict[str, Any]) -> RenderableType:
    """Return an episode as something to read: what was asked, what memory was shown, each step, what it was worth."""
    what = f"{one['environment']} {one['task']} ({one['split']})" if one["environment"] else "asked by a client"
    parts: list[RenderableType] = [
        Text.assemble((one["id"], "bold"), f"  {what}, policy {one['policy']}, ", coloured(one["stage"])),
    ]
    if one["memory_text"]:
        parts.append(Panel(Text(one["memory_text"]), title="memory shown", title_align="left", border_style="magenta"))
    parts += [_message(message["role"], message.get("content") or "") for message in one["opening"]]
    parts += [_step(step) for step in one["steps"]]
    if one["answer"]:
        parts.append(_message("answer", one["answer"]))
    if one["error"]:
        parts.append(Text(f"ended by {one['error']}", style="red"))
    for reward in one["rewards"]:
        parts.append(Text(f"reward {reward['value']:.2f} by {reward['source']}: {reward['reason']}", style="bold"))
    for said in one["feedback"]:
        words = ", ".join(str(said[name]) for name in ("value", "comment", "correction") if said[name] is not None)
        parts.append(Text(f"feedback {said['name']}: {words}"))
    parts.append(
        Text(
            f"{one['num_steps']} steps, {one['prompt_tokens']} prompt tokens, {one['output_tokens']} output tokens, "
            f"{one['num_invalid_tool_calls']} invalid tool calls",
            style="dim",
        )
    )
    return Group(*parts)


def _message(role: str, content: str) -> RenderableType:
    return Group(Text(role, style="bold cyan"), Padding(Text(content), (0, 0, 0, 2)))


def _step(step: dict[str, Any]) -> RenderableType:
    tokens = f" {step['num_prompt_tokens']}+{step['num_output_tokens']} tokens" if step["num_prompt_tokens"] else ""
    head = Text(f"{step['position']:3} ", style="dim")
    head.append(step["tool_name"] or step["kind"], style="bold green" if step["kind"] == "model" else "bold yellow")
    head.append(f" {step['seconds']:.2f} s{tokens}", style="dim")
    lines: list[RenderableType] = [head]
    if step["content"]:
        lines.append(Padding(Text(step["content"]), (0, 0, 0, 6)))
    for call in step["tool_calls"]:
        function = call.get("function", {})
        lines.append(
            Padding(Text(f"> {function.get('name')}({function.get('arguments')})", style="green"), (0, 0, 0, 6))
        )
    if step["error"]:
        lines.append(Padding(Text(step["error"], style="red"), (0, 0, 0, 6)))
    return Group(*lines)


def doctor_table(diagnosis: dict[str, Any]) -> Table:
    table = table_of("", "what", "how it is")
    for check in diagnosis["checks"]:
        mark = Text("ok", style="green") if check["is_ok"] else Text("!!", style="bold red")
        detail = check["detail"] + (f"\n-> {check['mend']}" if check["mend"] and not check["is_ok"] else "")
        table.add_row(mark, check["name"], Text(detail))
    return table


class Phases:
    """What a starting server is doing: a spinner where there is a terminal, lines where there is none."""

    def __init__(self, console: Console, *, is_silent: bool = False) -> None:
        self._console = console
        self._is_silent = is_silent
        self._phase: str | None = None
        self._began = time.monotonic()
        self._status = console.status("") if console.is_terminal and not is_silent else None

    def say(self, phase: str) -> None:
        """Name the phase that begins; the one before has ended."""
        if self._is_silent:
            return
        self.end()
        self._phase, self._began = phase, time.monotonic()
        if self._status:
            self._status.update(f"{escape(phase)} ...")
            self._status.start()
        else:
            self._console.print(f"  {phase} ...", markup=False, highlight=False)

    def end(self) -> None:
        """The phase has ended, and none follows for now."""
        if self._phase is not None and self._status:
            self._status.stop()
            seconds = time.monotonic() - self._began
            self._console.print(f"  [green]ok[/] {escape(self._phase)} [dim]{seconds:.1f} s[/]", highlight=False)
        self._phase = None
