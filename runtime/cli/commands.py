"""Commands that talk to a running server: play, policies, promote, rollback, trajectories, feedback.

Hazard: nothing heavy may be imported at module level; a client command must start within a second.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from runtime.cli.chat import chat
from runtime.cli.cycles import add_cycle_commands
from runtime.cli.datasets.commands import add_dataset_commands
from runtime.cli.documents import add_document_commands
from runtime.cli.options import DEFAULT_URL, Json, Key, Url, connect, get_and_print, is_on, post_and_print
from runtime.cli.output import progress_console, run_command
from runtime.cli.reviews import add_review_commands

trajectories = typer.Typer(help="Recorded episodes, step by step.", no_args_is_help=True)


def add_commands(app: typer.Typer) -> None:
    """Add every command that talks to the running server to the command line."""
    for command in (chat, play, policies, promote, rollback, feedback):
        app.command()(command)
    app.add_typer(trajectories, name="trajectories")
    add_cycle_commands(app)
    add_document_commands(app)
    add_review_commands(app)
    add_dataset_commands(app)


def play(
    environment: Annotated[str, typer.Option(help="The environment.")] = "textworld",
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks of the split.")] = 64,
    split: Annotated[
        str, typer.Option(help="practice (may be learned from) or held-out (only measures).")
    ] = "held-out",
    seeds: Annotated[
        str | None, typer.Option(help="Seeds instead of the split's first tasks, e.g. 900000:900200.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="The policy that plays, e.g. v3; by default the active one.")
    ] = None,
    memory: Annotated[str, typer.Option(help="on or off.")] = "on",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent episodes.")] = 16,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Play tasks through the running server; print the success rate with a 95 % interval."""
    from runtime.cli import render
    from runtime.cli.play import PlayRequest, play_tasks

    request = PlayRequest(
        environment=environment,
        num_tasks=tasks,
        split=split,
        seeds=seeds,
        policy=policy,
        use_memory=is_on("--memory", memory),
        temperature=temperature,
        seed=seed,
        concurrency=concurrency,
    )

    async def work() -> dict[str, Any]:
        with render.play_progress(progress_console(as_json)) as progress:
            bar = progress.add_task("asking the server", total=None)

            def on_played(num_done: int, num_successes: int, num_tasks: int) -> None:
                description = f"playing, {num_successes} won"
                progress.update(bar, completed=num_done, total=num_tasks, description=description)

            async with connect(url, key) as client:
                return await play_tasks(
                    client,
                    request,
                    on_phase=lambda phase: progress.update(bar, description=phase),
                    on_played=on_played,
                )

    run_command(work, as_json=as_json, render=render.play_summary)


def policies(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """List all policies with their stages and verdicts."""
    from runtime.cli import render

    get_and_print("/v1/policies", url, key, as_json, render.policies_table)


def promote(
    version: Annotated[str, typer.Argument(help="e.g. v3")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Activate a policy, from the next episode on."""
    post_and_print(f"/v1/policies/{version}/promote", url, key, as_json, lambda policy: f"{policy['name']} acts now")


def rollback(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Reactivate the previous policy."""
    # Not repeatable: two rollbacks go back by two policies.
    post_and_print("/v1/policies/rollback", url, key, as_json, lambda policy: f"{policy['name']} acts again")


@trajectories.command("list")
def list_trajectories(
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    environment: str | None = None,
    split: str | None = None,
    policy: str | None = None,
    stage: str | None = None,
    success: bool | None = None,
    user: Annotated[str | None, typer.Option(help="Only episodes of this person.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List trajectories, newest first."""
    from runtime.cli import render

    get_and_print(
        "/v1/trajectories",
        url,
        key,
        as_json,
        render.trajectories_table,
        limit=limit,
        environment=environment,
        split=split,
        policy=policy,
        stage=stage,
        success=success,
        user=user,
    )


@trajectories.command("show")
def show_trajectory(
    trajectory_id: Annotated[str, typer.Argument(metavar="ID")],
    tokens: Annotated[bool, typer.Option("--tokens", help="Include token ids (JSON only).")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show a trajectory step by step."""
    from runtime.cli import render

    get_and_print(
        f"/v1/trajectories/{trajectory_id}", url, key, as_json, render.trajectory_story, token_ids=tokens or None
    )


def feedback(
    target: Annotated[str, typer.Argument(metavar="ID", help="The id of an answer, a response or a trajectory.")],
    value: Annotated[
        str | None, typer.Argument(help="good, bad, thumbs_up, thumbs_down, or a number from 0 to 1.")
    ] = None,
    comment: Annotated[str | None, typer.Option(help="A comment.")] = None,
    correction: Annotated[str | None, typer.Option(help="The better answer.")] = None,
    name: Annotated[str | None, typer.Option(help="The rated property; with it, VALUE may be any text.")] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Position of a step; the feedback applies to it alone.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="The person who gives it; by default the episode's.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Give feedback on an episode: it becomes a reward, and corrections are learned."""
    fields = {
        "target": target,
        "value": None if value is None else _parse_value(value),
        "comment": comment,
        "correction": correction,
        "name": name,
        "step": step,
        "user": user,
    }
    body = {field: value for field, value in fields.items() if value is not None}

    def render(stored: dict[str, Any]) -> str:
        return f"{stored['feedback_id']} is kept with {stored['trajectory_id']}"

    # Not repeatable: without an `id` a second post is a second piece of feedback.
    post_and_print("/v1/feedback", url, key, as_json, render, body)


def _parse_value(text: str) -> bool | int | float | str:
    """Return a number or boolean if the text is one in JSON, otherwise the text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    # Only scalars: `null`, a list or an object stays the text that was typed.
    return value if isinstance(value, bool | int | float) else text
