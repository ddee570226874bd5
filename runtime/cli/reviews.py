"""The commands about insights and exemplars: list, approve, edit, retire."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from runtime.cli.options import DEFAULT_URL, Json, Key, Url, get_and_print, post_and_print

insights = typer.Typer(help="Lessons as text: list, approve, edit, retire.", invoke_without_command=True)
exemplars = typer.Typer(help="Past successes that prompts show: list, approve, edit, retire.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="An id from the list.")]
Text = Annotated[str | None, typer.Option(help="A text that replaces the recorded one.")]
Status = Annotated[
    str | None, typer.Option(help="active (the default), pending (not shown to all yet), approved, retired or removed.")
]


def add_review_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
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
    """List lessons, strongest first; or approve, edit or retire one."""
    if context.invoked_subcommand is not None:
        return
    from runtime.cli import render

    table = render.insights_table
    get_and_print("/v1/insights", url, key, as_json, table, environment=environment, kind=kind, status=status)


@insights.command("approve")
def approve_insight(
    insight_id: Id, text: Text = None, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False
) -> None:
    """Show a lesson to the whole tenant."""
    body = {"text": text} if text is not None else None
    post_and_print(f"/v1/insights/{insight_id}/approve", url, key, as_json, _render_audience, body)


@insights.command("edit")
def edit_insight(
    insight_id: Id,
    text: Annotated[str, typer.Argument(help="The new text.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Edit the text of a lesson; its audience stays the same."""
    post_and_print(f"/v1/insights/{insight_id}/edit", url, key, as_json, _render_audience, {"text": text})


@insights.command("retire")
def retire_insight(insight_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Stop showing a lesson."""
    post_and_print(f"/v1/insights/{insight_id}/retire", url, key, as_json, _render_audience)


@exemplars.command("list")
def list_exemplars(
    status: Status = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List past successes, newest first, with the text that prompts show."""
    from runtime.cli import render

    get_and_print("/v1/exemplars", url, key, as_json, render.exemplars_table, status=status, limit=limit)


@exemplars.command("approve")
def approve_exemplar(
    exemplar_id: Id, text: Text = None, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False
) -> None:
    """Show a past success to the whole tenant."""
    body = {"text": text} if text is not None else None
    post_and_print(f"/v1/exemplars/{exemplar_id}/approve", url, key, as_json, _render_audience, body)


@exemplars.command("edit")
def edit_exemplar(
    exemplar_id: Id,
    text: Annotated[str, typer.Argument(help="The new text.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Edit the text in which a past success is shown; its audience stays the same."""
    post_and_print(f"/v1/exemplars/{exemplar_id}/edit", url, key, as_json, _render_audience, {"text": text})


@exemplars.command("retire")
def retire_exemplar(exemplar_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Stop showing a past success."""
    post_and_print(f"/v1/exemplars/{exemplar_id}/retire", url, key, as_json, _render_audience)


def _render_audience(row: dict[str, Any]) -> str:
    audience = {"tenant": "the whole tenant", "user": f"{row['user_id']!r} alone", "nobody": "nobody"}[row["shown_to"]]
    return f"{row['id']} is shown to {audience}: {row['text']}"
