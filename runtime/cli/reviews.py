"""The verbs about single memories: list, approve, edit and retire insights and exemplars.

They ask the running server, as the other client verbs do.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from runtime.cli.verbs import DEFAULT_URL, Json, Key, Url, get, post

insights = typer.Typer(help="Lessons in words: list, approve, edit, retire.", invoke_without_command=True)
exemplars = typer.Typer(help="Past successes that are shown again: list, approve, retire.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="As the list names it.")]
Text = Annotated[str | None, typer.Option(help="Approve these words in place of the recorded ones.")]
Status = Annotated[
    str | None, typer.Option(help="active (the default), pending (not shown to all yet), approved or retired.")
]


def add_review_verbs(app: typer.Typer) -> None:
    """Put the verbs on the command line."""
    app.add_typer(insights, name="insights")
    app.add_typer(exemplars, name="exemplars")


@insights.callback()
def list_insights(
    context: typer.Context,
    environment: Annotated[str | None, typer.Option(help="Only of this environment.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only for this kind of task.")] = None,
    status: Status = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List the lessons in words, strongest first; or approve, edit or retire one."""
    if context.invoked_subcommand is not None:
        return
    from runtime.cli import render as show

    get("/v1/insights", url, key, as_json, show.insights_table, environment=environment, kind=kind, status=status)


@insights.command("approve")
def approve_insight(
    insight_id: Id, text: Text = None, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False
) -> None:
    """Show a lesson to the whole tenant."""
    body = {"text": text} if text is not None else None
    post(f"/v1/insights/{insight_id}/approve", url, key, as_json, _say_who_sees, body)


@insights.command("edit")
def edit_insight(
    insight_id: Id,
    text: Annotated[str, typer.Argument(help="The better words.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Put a lesson into other words; who is shown it stays the same."""
    post(f"/v1/insights/{insight_id}/edit", url, key, as_json, _say_who_sees, {"text": text})


@insights.command("retire")
def retire_insight(insight_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Show a lesson to nobody again."""
    post(f"/v1/insights/{insight_id}/retire", url, key, as_json, _say_who_sees)


@exemplars.command("list")
def list_exemplars(
    status: Status = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List past successes, newest first, as they are shown."""
    from runtime.cli import render as show

    get("/v1/exemplars", url, key, as_json, show.exemplars_table, status=status, limit=limit)


@exemplars.command("approve")
def approve_exemplar(
    exemplar_id: Id, text: Text = None, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False
) -> None:
    """Show a past success to the whole tenant."""
    body = {"text": text} if text is not None else None
    post(f"/v1/exemplars/{exemplar_id}/approve", url, key, as_json, _say_who_sees, body)


@exemplars.command("retire")
def retire_exemplar(exemplar_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Show a past success to nobody again."""
    post(f"/v1/exemplars/{exemplar_id}/retire", url, key, as_json, _say_who_sees)


def _say_who_sees(row: dict[str, Any]) -> str:
    whom = {"tenant": "the whole tenant", "user": f"{row['user_id']!r} alone", "nobody": "nobody"}[row["shown_to"]]
    return f"{row['id']} is shown to {whom}: {row['text']}"
