"""The everyday verbs beside `chat`: documents, feedback, cycles and their reports, all of the running server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli.chat import chat
from runtime.cli.output import BAD_USAGE, Failure, perform, watching
from runtime.cli.verbs import DEFAULT_URL, Json, Key, Url, connect, get, post

documents = typer.Typer(help="What the agent may read: add, list, search, remove.", no_args_is_help=True)

STANDARD_INPUT = "-"


def add_everyday_verbs(app: typer.Typer) -> None:
    """Put the verbs on the command line."""
    for verb in (chat, feedback, cycles, report):
        app.command()(verb)
    app.add_typer(documents, name="documents")


@documents.command("add")
def add_documents(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="UTF-8 text; - is standard input.")],
    title: Annotated[
        str | None, typer.Option(help="Of one file; else the path as given. A known title is replaced.")
    ] = None,
    untrusted: Annotated[
        bool, typer.Option("--untrusted", help="Others wrote it: an episode that reads it teaches nothing.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Give the agent texts to read."""
    if title is not None and len(files) > 1:
        raise Failure("--title names one document: add the files one by one", exit_code=BAD_USAGE)
    if title is None and STANDARD_INPUT in files:
        raise Failure("standard input needs a --title", exit_code=BAD_USAGE)
    texts = {title or Path(name).as_posix(): _read_text(name) for name in files}

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            added = [
                await client.post(
                    "/v1/documents", {"title": named, "text": text, "is_trusted": not untrusted}, is_repeatable=True
                )
                for named, text in texts.items()
            ]
        return {"object": "list", "data": added}

    def show(added: dict[str, Any]) -> str:
        return "\n".join(f"{row['id']}  {row['title']}" for row in added["data"])

    perform(work, as_json=as_json, show=show)


def _read_text(name: str) -> str:
    try:
        return sys.stdin.read() if name == STANDARD_INPUT else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Failure(f"{name!r} is not UTF-8 text: convert it first", exit_code=BAD_USAGE) from None
    except OSError as error:
        raise Failure(f"cannot read {name!r}: {error.strerror}", exit_code=BAD_USAGE) from None


@documents.command("list")
def list_documents(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """List the documents by title."""
    from runtime.cli import render as show

    get("/v1/documents", url, key, as_json, show.documents_table)


@documents.command("search")
def search_documents(
    query: Annotated[str, typer.Argument(help="A question, or words.")],
    limit: Annotated[int, typer.Option(min=1, max=50, help="Passages at most.")] = 5,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show the passages nearest to a question, as the agent would find them."""
    from runtime.cli import render as show

    post("/v1/documents/search", url, key, as_json, show.passages_found, {"query": query, "limit": limit})


@documents.command("remove")
def remove_document(
    document_id: Annotated[str, typer.Argument(metavar="ID", help="As the list names it.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Take a document away again."""

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            return await client.delete(f"/v1/documents/{document_id}")

    perform(work, as_json=as_json, show=lambda removed: f"{removed['id']} is removed")


def feedback(
    target: Annotated[str, typer.Argument(metavar="ID", help="Of an answer, a response or a trajectory.")],
    value: Annotated[
        str | None, typer.Argument(help="good, bad, thumbs_up, thumbs_down, or a number from 0 to 1.")
    ] = None,
    comment: Annotated[str | None, typer.Option(help="In words.")] = None,
    correction: Annotated[str | None, typer.Option(help="What the answer should have been.")] = None,
    name: Annotated[
        str | None, typer.Option(help="What is judged, if not the whole: then VALUE may be any text.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="The one step that is meant; it rewards nothing else.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Who says so; the episode's person if not given.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Say how an episode went: it becomes a reward, and a correction is learned from."""
    said = {
        "target": target,
        "value": None if value is None else _read_value(value),
        "comment": comment,
        "correction": correction,
        "name": name,
        "step": step,
        "user": user,
    }
    body = {field: given for field, given in said.items() if given is not None}

    def show(kept: dict[str, Any]) -> str:
        return f"{kept['feedback_id']} is kept with {kept['trajectory_id']}"

    post("/v1/feedback", url, key, as_json, show, body)


def _read_value(text: str) -> Any:
    """Return a number or a boolean where the text is one as JSON writes it."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, bool | int | float) else text


def cycles(
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List the turns of the loop, newest first."""
    from runtime.cli import render as show

    get("/v1/cycles", url, key, as_json, show.cycles_table, limit=limit)


def report(
    cycle: Annotated[
        str | None, typer.Argument(metavar="[CYCLE]", help="The newest that has a report, if none is given.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Read the release report of a cycle. Where no cycle has one yet, nothing is printed."""
    from runtime.cli import render as show
    from runtime.cli.learn import newest_report, read_report

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            chosen = cycle or await newest_report(client)
            if chosen is None:
                watching(as_json).print("no cycle has a report yet: `learn` turns the loop and ends with one")
                return {"cycle": None, "report": None, "markdown": None}
            figures, markdown = await read_report(client, chosen)
            return {"cycle": chosen, "report": figures, "markdown": markdown}

    perform(work, as_json=as_json, show=show.report_page)
