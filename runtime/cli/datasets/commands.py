"""The commands `import`, `export` and `examples`.

Hazard: nothing heavy may be imported at module level; a client command must start within a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.options import DEFAULT_URL, Json, Key, Url, call_and_print, connect, get_and_print
from runtime.cli.output import BAD_USAGE, Failure, progress_console, run_command

if TYPE_CHECKING:
    from rich.table import Table

examples = typer.Typer(help="Imported training data: list, count, show, remove.", no_args_is_help=True)
CONTENTS = ("trajectories", "demonstrations", "preferences", "labels")


def add_dataset_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("import")(import_examples)
    app.command("export")(export_rows)
    app.add_typer(examples, name="examples")


def import_examples(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON lines or a JSON array; also .gz.")],
    format: Annotated[str, typer.Option(help="The format of the rows; auto recognises it.")] = "auto",
    environment: Annotated[
        str, typer.Option(help="Cycles of this environment learn from the rows; by default those of live traffic.")
    ] = "",
    source: Annotated[str | None, typer.Option(help="A name for the rows; by default the file's.")] = None,
    on_error: Annotated[
        str, typer.Option(help="stop: an invalid line, and nothing of any file is imported. skip: without it.")
    ] = "stop",
    check: Annotated[bool, typer.Option("--check", help="Only validate the files; no server is needed.")] = False,
    untrusted: Annotated[bool, typer.Option("--untrusted", help="Keep the rows, but never learn from them.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Import training data: OpenAI, TRL, ShareGPT, SMART, Alpaca, xLAM, tau-bench and others. Rows that are there
    already are skipped, so that an import that broke off is simply run again."""
    if on_error not in ("stop", "skip"):
        raise Failure(f"--on-error is stop or skip, not {on_error!r}", exit_code=BAD_USAGE)

    async def work() -> dict[str, Any]:
        from runtime.cli.datasets.importing import ImportRequest, check_files, send_files
        from runtime.cli.datasets.progress import make_progress

        request = ImportRequest(files, format, environment, source, on_error == "skip", untrusted)
        with make_progress(progress_console(as_json)) as progress:
            checked = check_files(request, progress)
            if check:
                return {"object": "import.check", "files": [each.to_json() for each in checked]}
            async with connect(url, key) as client:
                return await send_files(client, request, checked, progress)

    run_command(work, as_json=as_json, render=_render_import)


def export_rows(
    content: Annotated[str, typer.Argument(help=f"{', '.join(CONTENTS[:-1])} or {CONTENTS[-1]}.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, JSON lines; with .gz at its end compressed.")],
    format: Annotated[str, typer.Option(help="The format of the rows.")] = "trl",
    environment: Annotated[str | None, typer.Option(help="Only of this one; '' for live traffic.")] = None,
    episodes: Annotated[bool, typer.Option(help="Include recorded episodes.")] = True,
    imported: Annotated[bool, typer.Option(help="Include imported examples.")] = True,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Export episodes and examples. An export that broke off goes on where it stopped when it is run again."""
    if content not in CONTENTS:
        raise Failure(f"{content!r} cannot be exported: use one of {', '.join(CONTENTS)}", exit_code=BAD_USAGE)

    async def work() -> dict[str, Any]:
        from runtime.cli.datasets.exporting import ExportRequest, export_to_file
        from runtime.cli.datasets.progress import make_progress

        request = ExportRequest(content, format, environment, episodes, imported, url)
        with make_progress(progress_console(as_json)) as progress:
            async with connect(url, key) as client:
                return await export_to_file(client, request, out, progress)

    run_command(work, as_json=as_json, render=_render_export)


@examples.command("list")
def list_examples(
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    kind: Annotated[str | None, typer.Option(help="demonstration, preference or label.")] = None,
    environment: str | None = None,
    source: str | None = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List examples, newest first."""
    query = {"limit": limit, "kind": kind, "environment": environment, "source": source}
    get_and_print("/v1/examples", url, key, as_json, _render_examples, **query)


@examples.command("count")
def count_examples(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Count examples by kind, environment and source."""
    get_and_print("/v1/examples/counts", url, key, as_json, _render_counts)


@examples.command("show")
def show_example(
    example_id: Annotated[str, typer.Argument(metavar="ID")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show an example with its messages."""
    import json

    def render(example: dict[str, Any]) -> str:
        return json.dumps(example, indent=1, ensure_ascii=False)

    get_and_print(f"/v1/examples/{example_id}", url, key, as_json, render)


@examples.command("remove")
def remove_examples(
    example_id: Annotated[str | None, typer.Argument(metavar="[ID]")] = None,
    source: Annotated[str | None, typer.Option(help="All examples of this source.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Remove one example, or all of a source."""
    if (example_id is None) == (source is None):
        raise Failure("name one example by its ID, or all of a --source", exit_code=BAD_USAGE)
    path = "/v1/examples" if example_id is None else f"/v1/examples/{example_id}"

    def render(deleted: dict[str, Any]) -> str:
        return f"{deleted['num_deleted']} removed"

    call_and_print(lambda client: client.delete(path, source=source), url, key, as_json, render)


def _render_import(result: dict[str, Any]) -> str:
    lines = []
    for each in result["files"]:
        counts = f"{each['num_rows']} rows, {each['num_invalid']} invalid"
        if "num_added" in each:
            counts += f", {each['num_added']} added, {each['num_known']} there already"
        lines.append(f"{each['file']}: {each['format'] or 'no format'} ({each['reason']}); {counts}")
        lines += [f"  {error}" for error in each["errors"]]
    if any(each.get("teaches") is False for each in result["files"]):
        lines.append("Weights do not learn from these rows: the key may not teach, or they are untrusted.")
    return "\n".join(lines)


def _render_export(result: dict[str, Any]) -> str:
    left_out = "".join(f"; {num} left out: {reason}" for reason, num in result["left_out"].items())
    return f"{result['num_rows']} rows in {result['file']}{left_out}"


def _render_examples(page: dict[str, Any]) -> Table:
    from runtime.cli.render import make_table

    table = make_table("id", "kind", "environment", "source", "format", "#messages")
    for row in page["data"]:
        cells = (row["kind"], row["environment"] or "live", row["source"], row["format"], str(row["num_messages"]))
        table.add_row(row["id"], *cells)
    # an id that is cut off is of no use
    table.columns[0].min_width = max((len(row["id"]) for row in page["data"]), default=0)
    return table


def _render_counts(counts: dict[str, Any]) -> Table:
    from runtime.cli.render import make_table

    table = make_table("kind", "environment", "source", "#examples")
    for row in counts["data"]:
        table.add_row(row["kind"], row["environment"] or "live", row["source"], str(row["num_examples"]))
    return table
