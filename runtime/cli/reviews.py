"""The commands about insights and exemplars: list, approve, edit, retire."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from runtime.cli.options import DEFAULT_URL, Json, Key, Url, call_and_print, get_and_print, post_and_print

insights = typer.Typer(help="Lessons as text: list, approve, edit, retire.", invoke_without_command=True)
exemplars = typer.Typer(help="Past successes that prompts show: list, approve, edit, retire.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="An id from the list.")]
Text = Annotated[str | None, typer.Option(help="A text that replaces the recorded one.")]
Status = Annotated[
    str | None, typer.Option(help="active (the default), pending (not shown to all yet), approved, retired or removed.")
]


def add_review_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    _add_reviews(insights, "/v1/insights", "a lesson")
    _add_reviews(exemplars, "/v1/exemplars", "a past success")
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

    query = {"environment": environment, "kind": kind, "status": status}
    call_and_print(lambda client: client.get_all("/v1/insights", **query), url, key, as_json, render.insights_table)


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


def _add_reviews(group: typer.Typer, path: str, noun: str) -> None:
    """Add the commands that change who is shown a memory, or its text."""

    @group.command("approve", help=f"Show {noun} to the whole tenant.")
    def approve(row_id: Id, text: Text = None, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
        body = {"text": text} if text is not None else None
        post_and_print(f"{path}/{row_id}/approve", url, key, as_json, _render_audience, body)

    @group.command("edit", help=f"Edit the text of {noun}; its audience stays the same.")
    def edit(
        row_id: Id,
        text: Annotated[str, typer.Argument(help="The new text.")],
        url: Url = DEFAULT_URL,
        key: Key = None,
        as_json: Json = False,
    ) -> None:
        post_and_print(f"{path}/{row_id}/edit", url, key, as_json, _render_audience, {"text": text})

    @group.command("retire", help=f"Stop showing {noun}.")
    def retire(row_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
        post_and_print(f"{path}/{row_id}/retire", url, key, as_json, _render_audience)


def _render_audience(row: dict[str, Any]) -> str:
    audience = {"tenant": "the whole tenant", "user": f"{row['user_id']!r} alone", "nobody": "nobody"}[row["shown_to"]]
    return f"{row['id']} is shown to {audience}: {row['text']}"
