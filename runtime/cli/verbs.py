"""The verbs that talk to a running server: play, learn, judge, policies, promote, rollback, trajectories.

Refuses to know the server's insides, and to import anything heavy: a verb is on the screen within a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.output import Failure, perform, watching
from runtime.cli.printable import printable

if TYPE_CHECKING:
    from runtime.cli.client import Client

DEFAULT_URL = "http://127.0.0.1:8080"

Url = Annotated[str, typer.Option("--url", envvar="RATCHET_URL", help="Where the server answers.")]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="RATCHET_KEY", show_envvar=True, help="An API key, where the server asks for one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

Config = Annotated[Path | None, typer.Option("-c", "--config", help="A TOML file; ./ratchet.toml if it is there.")]
Data = Annotated[str | None, typer.Option("--data", help="The data directory (.ratchet).")]

OPEN_ENDED = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands that take any setting as --section.key value."""

PLAY_NOTHING = {"environment": "", "practice_episodes": 0, "explore_episodes": 0}

trajectories = typer.Typer(help="What was lived, step by step.", no_args_is_help=True)


def add_verbs(app: typer.Typer) -> None:
    """Put the verbs on the command line."""
    for verb in (play, learn, judge, policies, promote, rollback):
        app.command()(verb)
    app.add_typer(trajectories, name="trajectories")


def connect(url: str, key: str | None) -> Client:
    from runtime.cli.client import Client

    return Client(url, key=key)


def play(
    environment: Annotated[str, typer.Option(help="Where to play.")] = "textworld",
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks of the split.")] = 64,
    split: Annotated[
        str, typer.Option(help="practice (may be learned from) or held-out (only measures).")
    ] = "held-out",
    seeds: Annotated[str | None, typer.Option(help="These seeds instead, e.g. 900000:900200.")] = None,
    policy: Annotated[str | None, typer.Option(help="Who plays, e.g. v3; the active policy if not given.")] = None,
    memory: Annotated[str, typer.Option(help="on or off.")] = "on",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Episodes at a time.")] = 16,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Play tasks through the running server; say how many succeeded, with a 95 % interval."""
    from runtime.cli import render as show
    from runtime.cli.play import Order
    from runtime.cli.play import play as play_order

    if memory not in ("on", "off"):
        raise Failure(f"--memory is on or off, not {memory!r}", exit_code=2)
    order = Order(
        environment=environment,
        num_tasks=tasks,
        split=split,
        seeds=seeds,
        policy=policy,
        use_memory=memory == "on",
        temperature=temperature,
        seed=seed,
        concurrency=concurrency,
    )

    async def work() -> dict[str, Any]:
        with show.play_progress(watching(as_json)) as progress:
            bar = progress.add_task("asking the server", total=None)

            def on_played(num_done: int, num_successes: int, num_tasks: int) -> None:
                description = f"playing, {num_successes} won"
                progress.update(bar, completed=num_done, total=num_tasks, description=description)

            async with connect(url, key) as client:
                return await play_order(
                    client,
                    order,
                    on_phase=lambda phase: progress.update(bar, description=phase),
                    on_played=on_played,
                )

    perform(work, as_json=as_json, show=show.play_summary)


def learn(
    environment: Annotated[str | None, typer.Option(help="Where to practise.")] = None,
    practice: Annotated[int | None, typer.Option(min=0, help="Episodes to collect; 0 learns from logged ones.")] = None,
    practice_tasks: Annotated[int | None, typer.Option(min=1, help="Tasks they are spread over.")] = None,
    explore: Annotated[int | None, typer.Option(min=0, help="Episodes to find preferences in.")] = None,
    logged: Annotated[
        bool, typer.Option("--logged", help="Play nothing: learn from what clients played. `judge` settles it.")
    ] = False,
    tasks: Annotated[int | None, typer.Option(min=1, help="Held-out tasks that decide.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any optimizer setting, e.g. recipe.sft_epochs=3.")
    ] = None,
    cycle: Annotated[str | None, typer.Option(help="Watch this cycle instead of starting one.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what the cycle would need, and start nothing.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Turn the loop once on the running server: collect, learn, prove, swap or reject; ends with the report.

    Begins by saying what the cycle needs and how much of it there is, and plays nothing for one that cannot train.
    """
    from runtime.cli import render as show
    from runtime.cli.learn import check_cycle, nest, require_ready, start_cycle, watch_cycle

    if logged and (environment or practice or explore):
        raise Failure("--logged plays nothing: leave --environment, --practice and --explore out", exit_code=2)
    settings = nest(
        {
            "environment": environment,
            "practice_episodes": practice,
            "num_practice_tasks": practice_tasks,
            "explore_episodes": explore,
            "evaluation.num_tasks": tasks,
            **(PLAY_NOTHING if logged else {}),
            **_read_settings(setting or []),
        }
    )
    if check:
        _show_needs(settings, url, key, as_json)
        return
    under_way: list[str] = [cycle] if cycle else []

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            console = watching(as_json)
            if not under_way:
                needs = await check_cycle(client, settings)
                console.print(show.needs_table(printable(needs)))
                require_ready(needs)
                under_way.append(await start_cycle(client, settings))
            console.print(f"cycle [bold]{under_way[0]}[/]")
            pool = (await client.get(f"/v1/cycles/{under_way[0]}"))["artifacts"].get("pool")
            if pool:
                console.print(printable(pool), markup=False, highlight=False)
            with show.CycleLines(console) as lines:
                return await watch_cycle(client, under_way[0], lines.update)

    try:
        perform(work, as_json=as_json, show=show.cycle_outcome)
    except KeyboardInterrupt:
        if not under_way:
            raise
        raise Failure(
            f"no longer watching; the cycle goes on: watch it with `learn --cycle {under_way[0]}`",
            exit_code=130,
            cycle=under_way[0],
        ) from None


def _show_needs(settings: dict[str, Any], url: str, key: str | None, as_json: bool) -> None:
    from runtime.cli import render as show
    from runtime.cli.learn import check_cycle

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            return await check_cycle(client, settings)

    if not perform(work, as_json=as_json, show=show.needs_table)["is_ready"]:
        raise typer.Exit(1)


def _read_settings(given: list[str]) -> dict[str, Any]:
    import json

    settings: dict[str, Any] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise Failure(f"--set wants key=value, not {one!r}", exit_code=2)
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
    """Decide on a candidate, or on one that was rejected, by held-out tasks that have not decided on it yet."""
    from runtime.cli import learn
    from runtime.cli import render as show

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            return await learn.judge(client, version)

    perform(work, as_json=as_json, show=show.cycle_outcome)


def policies(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """List all policies: who acts, who acted, who may."""
    from runtime.cli import render as show

    get("/v1/policies", url, key, as_json, show.policies_table)


def promote(
    version: Annotated[str, typer.Argument(help="e.g. v3")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Let a policy act, from the next episode on."""
    post(f"/v1/policies/{version}/promote", url, key, as_json, lambda policy: f"{policy['name']} acts now")


def rollback(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Let the policy act that acted before."""
    post("/v1/policies/rollback", url, key, as_json, lambda policy: f"{policy['name']} acts again")


@trajectories.command("list")
def list_trajectories(
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    environment: str | None = None,
    split: str | None = None,
    policy: str | None = None,
    stage: str | None = None,
    success: bool | None = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List the newest."""
    from runtime.cli import render as show

    wanted = {"limit": limit, "environment": environment, "split": split, "policy": policy, "stage": stage}
    get("/v1/trajectories", url, key, as_json, show.trajectories_table, success=success, **wanted)


@trajectories.command("show")
def show_trajectory(
    trajectory_id: Annotated[str, typer.Argument(metavar="ID")],
    tokens: Annotated[bool, typer.Option("--tokens", help="With token ids (JSON only).")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Read one, step by step."""
    from runtime.cli import render as show

    get(f"/v1/trajectories/{trajectory_id}", url, key, as_json, show.trajectory_story, token_ids=tokens or None)


def get(path: str, url: str, key: str | None, as_json: bool, show: Any, **query: Any) -> None:
    """Get, and show the answer."""

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            return await client.get(path, **query)

    perform(work, as_json=as_json, show=show)


def post(path: str, url: str, key: str | None, as_json: bool, show: Any, body: dict[str, Any] | None = None) -> None:
    """Post, and show the answer."""

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            return await client.post(path, body)

    perform(work, as_json=as_json, show=show)
