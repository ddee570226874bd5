"""The commands about cycles: learn, judge, cycles, report.

A cycle runs in the server: interrupting `learn` only stops watching, `learn --cycle ID` continues, and
`learn --cancel ID` stops the cycle.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.options import DEFAULT_URL, Json, Key, Url, call_and_print, connect, get_and_print, post_and_print
from runtime.cli.output import BAD_USAGE, INTERRUPTED, Failure, progress_console, run_command
from runtime.cli.printable import printable

if TYPE_CHECKING:
    from runtime.cli.client import Client

POLL_SECONDS = 1.0
# Keys of `OptimizerConfig`; the client must not import the optimizer.
PLAY_NOTHING = {"environment": "", "practice_episodes": 0, "explore_episodes": 0}
"""Settings of a cycle that learns from logged episodes only."""

OnCycle = Callable[[dict[str, Any]], None]
"""Called with the cycle's JSON after each poll."""


def add_cycle_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (learn, judge, cycles, report):
        app.command()(command)


def learn(
    environment: Annotated[str | None, typer.Option(help="The environment for practice and the gate.")] = None,
    practice: Annotated[int | None, typer.Option(min=0, help="Episodes to collect; 0 learns from logged ones.")] = None,
    practice_tasks: Annotated[int | None, typer.Option(min=1, help="Number of tasks for these episodes.")] = None,
    explore: Annotated[int | None, typer.Option(min=0, help="Episodes that explore for preferences.")] = None,
    logged: Annotated[
        bool, typer.Option("--logged", help="Play nothing: learn from episodes of clients. `judge` decides then.")
    ] = False,
    tasks: Annotated[int | None, typer.Option(min=1, help="Held-out tasks of the release gate.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any optimizer setting, e.g. recipe.sft_epochs=3.")
    ] = None,
    cycle: Annotated[str | None, typer.Option(help="Watch this cycle instead of starting one.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Print the cycle's needs and start nothing.")] = False,
    cancel: Annotated[str | None, typer.Option(help="Cancel this cycle; its records stay.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Run a cycle on the server: collect, train, evaluate, promote or reject; prints the report at the end.

    First checks the cycle's needs, and plays nothing for a cycle that could not train.
    """
    from runtime.cli import render

    if cancel is not None:
        post_and_print(f"/v1/cycles/{cancel}/cancel", url, key, as_json, lambda cycle: f"{cycle['id']} is cancelled")
        return
    if logged and (environment or practice or explore):
        raise Failure("--logged plays nothing: leave --environment, --practice and --explore out", exit_code=BAD_USAGE)
    settings = nest(
        {
            "environment": environment,
            "practice_episodes": practice,
            "num_practice_tasks": practice_tasks,
            "explore_episodes": explore,
            "evaluation.num_tasks": tasks,
            **(PLAY_NOTHING if logged else {}),
            **_parse_settings(setting or []),
        }
    )
    if check:
        _print_needs(settings, url, key, as_json)
        return
    cycle_id = cycle

    async def work() -> dict[str, Any]:
        nonlocal cycle_id
        async with connect(url, key) as client:
            console = progress_console(as_json)
            if cycle_id is None:
                needs = await check_cycle(client, settings)
                console.print(render.needs_table(printable(needs)))
                require_ready(needs)
                cycle_id = await start_cycle(client, settings)
            console.print(f"cycle [bold]{cycle_id}[/]")
            opened = (await client.get(f"/v1/cycles/{cycle_id}"))["artifacts"]
            for note in filter(None, (opened.get("pool"), opened.get("methods_reason"))):
                console.print(printable(note), markup=False, highlight=False)
            with render.CycleLines(console) as lines:
                return await watch_cycle(client, cycle_id, lines.update)

    try:
        run_command(work, as_json=as_json, render=render.cycle_outcome)
    except KeyboardInterrupt:  # the cycle itself runs in the server and continues
        if cycle_id is None:
            raise
        message = f"no longer watching; the cycle goes on: watch it with `learn --cycle {cycle_id}`, or `--cancel` it"
        raise Failure(message, exit_code=INTERRUPTED, cycle=cycle_id) from None


def _print_needs(settings: dict[str, Any], url: str, key: str | None, as_json: bool) -> None:
    from runtime.cli import render

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            return await check_cycle(client, settings)

    if not run_command(work, as_json=as_json, render=render.needs_table)["is_ready"]:
        raise typer.Exit(1)


def _parse_settings(assignments: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise Failure(f"--set wants key=value, not {assignment!r}", exit_code=BAD_USAGE)
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def judge(
    version: Annotated[str, typer.Argument(help="A candidate, e.g. v3")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Decide on a candidate or a rejected policy by held-out tasks that no earlier decision on it used."""
    from runtime.cli import render

    call_and_print(lambda client: decide_on(client, version), url, key, as_json, render.cycle_outcome)


def cycles(
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List cycles, newest first."""
    from runtime.cli import render

    get_and_print("/v1/cycles", url, key, as_json, render.cycles_table, limit=limit)


def report(
    cycle: Annotated[
        str | None, typer.Argument(metavar="[CYCLE]", help="A cycle's id; by default the newest with a report.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Print the release report of a cycle; nothing if no cycle has one yet."""
    from runtime.cli import render

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            chosen = cycle or await newest_report(client)
            if chosen is None:
                progress_console(as_json).print(
                    "no cycle has a report yet: `learn` runs a cycle and ends with its report"
                )
                return {"cycle": None, "report": None, "markdown": None}
            figures, markdown = await read_report(client, chosen)
            return {"cycle": chosen, "report": figures, "markdown": markdown}

    run_command(work, as_json=as_json, render=render.report_page)


async def check_cycle(client: Client, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the needs of a cycle. Raises: ErrorReply for invalid settings, ServerUnreachable."""
    return await client.post("/v1/cycles/check", {"settings": settings}, is_repeatable=True)


def require_ready(needs: dict[str, Any]) -> None:
    """Raise Failure if anything required is missing, except the engine: starting the cycle waits for it."""
    required = [need for need in needs["data"] if need["is_required"] and need["name"] != "engine"]
    missing = [need for need in required if need["num_missing"]]
    if missing:
        reasons = "; ".join(
            f"{need['num_missing']} {need['name']} are missing ({need['detail']}): {need['mend']}" for need in missing
        )
        raise Failure(f"nothing was played, because the cycle could not train: {reasons}", needs=needs["data"])


async def start_cycle(client: Client, settings: dict[str, Any]) -> str:
    """Start a cycle and return its id. Raises: ErrorReply (another one runs, invalid settings), ServerUnreachable."""
    # Not repeatable: the first attempt may have started a cycle.
    return (await client.post("/v1/cycles", {"settings": settings}))["id"]


async def watch_cycle(client: Client, cycle_id: str, on_cycle: OnCycle) -> dict[str, Any]:
    """Poll a cycle until its end and return its outcome.

    Raises:
        Failure: the cycle ended with an error.
        ErrorReply, ServerUnreachable.
    """
    while True:
        cycle = await client.get(f"/v1/cycles/{cycle_id}")
        on_cycle(cycle)
        if cycle["status"] == "error":
            message = f"cycle {cycle['id']} ended with an error: {cycle['error']}"
            raise Failure(message, cycle=cycle["id"], stage=cycle["stage"])
        if cycle["status"] == "completed":
            return await read_outcome(client, cycle)
        await asyncio.sleep(POLL_SECONDS)


async def read_outcome(client: Client, cycle: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome of a completed cycle: verdict, candidate and report."""
    from runtime.cli.client import ErrorReply

    try:
        report, markdown = await read_report(client, cycle["id"])
    except ErrorReply:  # a cycle that ended without an evaluation has no report
        report = markdown = None
    verdict = cycle["verdict"] or {}
    policies = await client.get("/v1/policies")
    candidate = cycle["artifacts"].get("candidate")
    return {
        "cycle": cycle["id"],
        "verdict": verdict.get("decision"),
        "reason": verdict.get("reason"),
        "policy": None if candidate is None else f"v{candidate}",
        "active": policies["active"],
        "report": report,
        "markdown": markdown,
    }


async def decide_on(client: Client, version: str) -> dict[str, Any]:
    """Have the server decide on a candidate, and return the outcome. Raises: ErrorReply, ServerUnreachable."""
    # Not repeatable: each comparison spends some of the active policy's error budget.
    decided = await client.post(f"/v1/policies/{version}/judge")
    report, markdown = await read_report(client, decided["cycle"])
    copied = {name: decided[name] for name in ("cycle", "reason", "policy", "active")}
    return {**copied, "verdict": decided["decision"], "report": report, "markdown": markdown}


async def newest_report(client: Client) -> str | None:
    """Return the id of the newest cycle that has a report. Raises: ErrorReply, ServerUnreachable."""
    newest = await client.get("/v1/cycles", limit=500)  # the server's largest page
    return next((cycle["id"] for cycle in newest["data"] if cycle["report_url"] is not None), None)


async def read_report(client: Client, cycle_id: str) -> tuple[dict[str, Any], str]:
    """Return the report of a cycle as JSON and as Markdown. Raises: ErrorReply, ServerUnreachable."""
    path = f"/v1/cycles/{cycle_id}/report"
    return await client.get(path), await client.get_text(path, format="markdown")


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Return `{"evaluation": {"num_tasks": 50}}` for `{"evaluation.num_tasks": 50}`, without values that are None."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        if value is None:
            continue
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return nested
