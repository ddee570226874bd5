"""The commands about documents: add, list, search, remove."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli.options import DEFAULT_URL, Json, Key, Url, call_and_print, connect, post_and_print
from runtime.cli.output import BAD_USAGE, Failure, run_command

documents = typer.Typer(help="Texts that the agent can search: add, list, search, remove.", no_args_is_help=True)

STANDARD_INPUT = "-"


def add_document_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(documents, name="documents")


@documents.command("add")
def add_documents(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="UTF-8 text; - is standard input.")],
    title: Annotated[
        str | None, typer.Option(help="Title of one file; by default its path. An existing title is replaced.")
    ] = None,
    untrusted: Annotated[
        bool, typer.Option("--untrusted", help="Text of others: no cycle learns from episodes that read it.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Add texts for the agent to search."""
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

    def render(added: dict[str, Any]) -> str:
        return "\n".join(f"{row['id']}  {row['title']}" for row in added["data"])

    run_command(work, as_json=as_json, render=render)


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
    from runtime.cli import render

    call_and_print(lambda client: client.get_all("/v1/documents"), url, key, as_json, render.documents_table)


@documents.command("search")
def search_documents(
    query: Annotated[str, typer.Argument(help="A question, or words.")],
    limit: Annotated[int, typer.Option(min=1, max=100, help="Maximum number of passages.")] = 5,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Print the passages that the agent would find for a question."""
    from runtime.cli import render

    post_and_print("/v1/documents/search", url, key, as_json, render.passages, {"query": query, "limit": limit})


@documents.command("remove")
def remove_document(
    document_id: Annotated[str, typer.Argument(metavar="ID", help="As the list names it.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Remove a document."""
    path = f"/v1/documents/{document_id}"
    call_and_print(lambda client: client.delete(path), url, key, as_json, lambda removed: f"{removed['id']} is removed")
