"""Renders the JSON of answers for a terminal: tables, progress, a readable episode.

Invariant: text from data is never interpreted as markup.
Hazard: this module imports rich's larger parts, so that commands import it inside functions.
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

STAGE_COLORS = {
    "active": "bold green",
    "candidate": "yellow",
    "canary": "yellow",
    "rejected": "red",
    "failed": "red",
    "cancelled": "yellow",
    "error": "red",
}


def make_table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; a column that starts with `#` is right-aligned."""
    # A cell given as a str is markup on a console with markup on: cells with data are `Text`, or the console is
    # print_result's.
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix("#"), justify="right" if column.startswith("#") else "left")
    return table


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def colored_stage(stage: str) -> Text:
    return Text(stage, style=STAGE_COLORS.get(stage, ""))


def first_line(text: str | None, *, limit: int = 200) -> Text:
    """Return the beginning of a text on one line, truncated to the width of its column."""
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
    """Return the table at the end of `play`."""
    num_tasks, num_turns = max(1, played["num_tasks"]), max(1, played["num_turns"])
    table = make_table(
        "policy", "memory", "#tasks", "#success", "#95 % interval", "#calls", "#prompt tokens", "#output tokens"
    )
    table.add_row(
        str(played["policy"]),
        "on" if played["use_memory"] else "off",
        str(played["num_tasks"]),
        Text(percent(played["success"]), style="bold"),
        f"{100 * played['low']:.1f} .. {100 * played['high']:.1f} %",
        f"{played['num_turns'] / num_tasks:.1f}",
        f"{played['prompt_tokens'] / num_turns:.0f} a call",
        f"{played['output_tokens'] / num_turns:.0f} a call",
    )
    rate = f"{played['seconds']:.1f} s, {played['num_tasks'] / max(played['seconds'], 1e-9):.1f} episodes/s"
    invalid = f"{played['num_invalid_tool_calls']} invalid tool calls"
    notes = f"{rate}, {invalid}" + (f", {played['num_failed']} episodes failed" if played["num_failed"] else "")
    return Group(table, Text(notes, style="dim"))


class CycleLines:
    """Prints one line per stage of a cycle: live in a terminal, otherwise when the stage ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: str | None = None
        self._started = time.monotonic()
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
        """Show the current state of the cycle."""
        cycle = printable(cycle)
        stage, progress = cycle["stage"], cycle["progress"] or {}
        if stage != self._stage:
            self._end_stage(stage)
        done, total = progress.get("done"), progress.get("total")
        counts = f"{done}/{total} " if total else ""
        self._message = escape(f"{counts}{progress.get('message', '')}".strip())
        if self._status and stage not in ("completed", "error"):
            self._status.update(f"[bold]{stage:12}[/] {self._message}")

    def _end_stage(self, stage: str) -> None:
        if self._stage is not None:
            seconds = time.monotonic() - self._started
            self._console.print(f"  [bold]{self._stage:12}[/] {seconds:6.0f} s  {self._message}", highlight=False)
        elif not self._status:
            self._console.print(f"  {stage} ...")
        self._stage, self._started, self._message = stage, time.monotonic(), ""


def needs_table(needs: dict[str, Any]) -> RenderableType:
    """Return a table of a cycle's needs, with the remedy for each missing amount."""
    table = make_table("", "what the cycle needs", "#needed", "#there", "#by playing, at most")
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
    """Return the report and the verdict, as far as they exist."""
    if outcome["verdict"] is None and not outcome["markdown"]:
        return ""
    line = Text(f"verdict: {outcome['verdict']}", style="bold")
    line.append(f"; candidate {outcome['policy']}, active {outcome['active']}", style="not bold")
    return Group(Markdown(outcome["markdown"]), Text(), line) if outcome["markdown"] else line


def report_page(outcome: dict[str, Any]) -> RenderableType:
    return Markdown(outcome["markdown"]) if outcome["markdown"] else ""


def policies_table(listed: dict[str, Any]) -> Table:
    table = make_table("policy", "stage", "parent", "adapter", "verdict", "made", "note")
    for policy in listed["data"]:
        verdict = policy["verdict"] or {}
        table.add_row(
            policy["name"],
            colored_stage(policy["stage"]),
            policy["parent"] or "-",
            (policy["adapter_path"] or "none").rsplit("/", 1)[-1],
            str(verdict.get("decision", "-")),
            policy["created_at"][:16].replace("T", " "),
            Text(policy["note"]),
        )
    return table


def keys_table(listed: dict[str, Any]) -> Table:
    table = make_table("id", "name", "tenant", "scopes", "#req/min", "#tok/min", "last used")
    table.columns[0].no_wrap, table.columns[0].min_width = True, 32  # ids are there to be copied
    for row in listed["data"]:
        limits = [str(row[name] or "-") for name in ("requests_per_minute", "tokens_per_minute")]
        used = "revoked" if row["revoked_at"] else (row["last_used_at"] or "never")[:10]
        table.add_row(row["id"], Text(row["name"]), row["tenant"] or "-", " ".join(row["scopes"]), *limits, used)
    return table


def insights_table(listed: dict[str, Any]) -> Table:
    table = make_table("id", "environment", "kind", "#strength", "#won", "#lost", "shown to", "insight")
    table.columns[0].no_wrap, table.columns[0].min_width = True, 28
    for row in listed["data"]:
        counts = str(row["strength"]), str(row["wins"]), str(row["losses"])
        table.add_row(row["id"], row["environment"], row["kind"], *counts, _audience(row), Text(row["text"]))
    return table


def exemplars_table(listed: dict[str, Any]) -> Table:
    table = make_table("id", "environment", "kind", "#steps", "shown to", "as it is shown")
    table.columns[0].no_wrap, table.columns[0].min_width = True, 28
    for row in listed["data"]:
        text = Text(row["text"])
        table.add_row(row["id"], row["environment"] or "-", row["kind"], str(row["num_steps"]), _audience(row), text)
    return table


def _audience(row: dict[str, Any]) -> Text:
    return Text(row["user_id"] if row["shown_to"] == "user" else row["shown_to"])


WIDE_COLUMNS = 110


def is_wide() -> bool:
    return shutil.get_terminal_size().columns >= WIDE_COLUMNS


def make_single_line_table(*columns: str, flexible: str) -> Table:
    """Return an empty table with rows of one line; the `flexible` column is truncated to fit."""
    table = make_table(*columns)
    for column in table.columns:
        column.no_wrap = column.header != flexible
    table.columns[0].min_width = 32  # ids must be complete, for copying
    return table


def trajectories_table(listed: dict[str, Any]) -> Table:
    columns = ["id", "policy", "asked", "stage", "#reward", *(("split", "#steps", "#tokens") if is_wide() else ())]
    table = make_single_line_table(*columns, flexible="asked")
    for row in listed["data"]:
        question = f"{row['environment']} {row['task']}" if row["environment"] else row["question"]
        wide_cells = (row["split"], str(row["num_steps"]), str(row["prompt_tokens"] + row["output_tokens"]))
        table.add_row(
            row["id"],
            row["policy"],
            first_line(question),
            colored_stage(row["stage"]),
            "-" if row["reward"] is None else f"{row['reward']:.2f}",
            *(wide_cells if is_wide() else ()),
        )
    return table


def cycles_table(listed: dict[str, Any]) -> Table:
    columns = ["id", "stage", "verdict", "policy", *(("begun",) if is_wide() else ()), "reason"]
    table = make_single_line_table(*columns, flexible="reason")
    for row in listed["data"]:
        verdict, candidate = row["verdict"] or {}, row["artifacts"].get("candidate")
        table.add_row(
            row["id"],
            colored_stage(row["stage"]),
            verdict.get("decision", "-"),
            "-" if candidate is None else f"v{candidate}",
            *((row["created_at"][:16].replace("T", " "),) if is_wide() else ()),
            first_line(row["error"] or verdict.get("reason", "")),
        )
    return table


def documents_table(listed: dict[str, Any]) -> Table:
    table = make_table("id", "added", "title")
    table.columns[0].no_wrap, table.columns[0].min_width = True, 32
    for row in listed["data"]:
        table.add_row(row["id"], row["created_at"][:10], Text(row["title"]))
    return table


def passages(listed: dict[str, Any]) -> RenderableType:
    if not listed["data"]:
        return Text("no passage of a document answers this")
    parts: list[RenderableType] = []
    for row in listed["data"]:
        parts.append(Text.assemble((row["title"], "bold"), f"  {row['score']:.2f}  ", (row["document_id"], "dim")))
        parts.append(Padding(Text(row["text"]), (0, 0, 1, 2)))
    return Group(*parts)


def trajectory_story(trajectory: dict[str, Any]) -> RenderableType:
    """Return a readable episode: its messages, the memory shown, each step, rewards and feedback."""
    task = f"{trajectory['environment']} {trajectory['task']} ({trajectory['split']})"
    origin = task if trajectory["environment"] else "asked by a client"
    stage = colored_stage(trajectory["stage"])
    parts: list[RenderableType] = [
        Text.assemble((trajectory["id"], "bold"), f"  {origin}, policy {trajectory['policy']}, ", stage),
    ]
    if trajectory["memory_text"]:
        parts.append(
            Panel(Text(trajectory["memory_text"]), title="memory shown", title_align="left", border_style="magenta")
        )
    parts += [_message(message["role"], message.get("content") or "") for message in trajectory["opening"]]
    parts += [_step(step) for step in trajectory["steps"]]
    if trajectory["answer"]:
        parts.append(_message("answer", trajectory["answer"]))
    if trajectory["error"]:
        parts.append(Text(f"ended by {trajectory['error']}", style="red"))
    for reward in trajectory["rewards"]:
        parts.append(Text(f"reward {reward['value']:.2f} by {reward['source']}: {reward['reason']}", style="bold"))
    for row in trajectory["feedback"]:
        content = ", ".join(str(row[name]) for name in ("value", "comment", "correction") if row[name] is not None)
        parts.append(Text(f"feedback {row['name']}: {content}"))
    totals = (
        f"{trajectory['num_steps']} steps, {trajectory['prompt_tokens']} prompt tokens, "
        f"{trajectory['output_tokens']} output tokens, {trajectory['num_invalid_tool_calls']} invalid tool calls"
    )
    parts.append(Text(totals, style="dim"))
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
    table = make_table("", "what", "how it is")
    for check in diagnosis["checks"]:
        mark = Text("ok", style="green") if check["is_ok"] else Text("!!", style="bold red")
        detail = check["detail"] + (f"\n-> {check['mend']}" if check["mend"] and not check["is_ok"] else "")
        table.add_row(mark, check["name"], Text(detail))
    return table


class Phases:
    """Prints the phases of a starting server: a spinner in a terminal, otherwise lines."""

    def __init__(self, console: Console, *, is_silent: bool = False) -> None:
        self._console = console
        self._is_silent = is_silent
        self._phase: str | None = None
        self._started = time.monotonic()
        self._status = console.status("") if console.is_terminal and not is_silent else None

    def begin(self, phase: str) -> None:
        """Print the phase that begins, and end the one before."""
        if self._is_silent:
            return
        self.end()
        self._phase, self._started = phase, time.monotonic()
        if self._status:
            self._status.update(f"{escape(phase)} ...")
            self._status.start()
        else:
            self._console.print(f"  {phase} ...", markup=False, highlight=False)

    def end(self) -> None:
        """End the current phase, if there is one."""
        if self._phase is not None and self._status:
            self._status.stop()
            seconds = time.monotonic() - self._started
            self._console.print(f"  [green]ok[/] {escape(self._phase)} [dim]{seconds:.1f} s[/]", highlight=False)
        self._phase = None


# Keys are the values of memory.share_live (memory/config.py).
SHARING = {
    "user": "Memory of a live request is shown to its own user alone; practice, to the whole tenant (docs/keys.md).",
    "tenant": "Memory is shown to the whole tenant, live requests included (memory.share_live).",
}
GAME_COMMANDS = ("play --tasks 32", "learn", "trajectories list")
"""For a model that cannot converse."""
CHAT_COMMANDS = ("chat", "documents add README.md", "trajectories list")


def render_banner(facts: dict[str, Any], *, command: str, option: str, can_converse: bool) -> str:
    """Return the text that a server prints once it answers. `command` starts the program, `option` selects the
    server."""
    if facts["requires_key"]:
        access = "Every request needs a key: give it to the commands below as RATCHET_KEY."
    else:
        access = "There are no keys: it listens on the loopback only."
    tries = "\n".join(f"  {command} {name}{option}" for name in (CHAT_COMMANDS if can_converse else GAME_COMMANDS))
    return f"""
Ratchet answers at {facts["url"]} with {facts["base_model"]} as policy {facts["policy"]}.
Its API is described at {facts["url"]}/docs
{access}
{SHARING[facts["share_live"]]}
Three things to try, in another terminal:

{tries}

Ctrl-C stops it."""
