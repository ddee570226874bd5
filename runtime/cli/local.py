"""Commands that work on local files: rebuild-index, copy-rows and doctor on the data directory, `tasks` on task files.

Invariant: the embedded files have one owner process, so rebuild-index and doctor ask the running server first and open
the directory only if none answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.options import DEFAULT_URL, OPEN_ENDED, Config, Data, Json, Key, ReadSettings, Url
from runtime.cli.output import Failure, progress_console, run_command
from runtime.cli.server_process import open_memory, prepare_environment

if TYPE_CHECKING:
    from memory.store import Memory
    from runtime.cli.render import Phases
    from runtime.config import RuntimeSettings


def add_local_commands(app: typer.Typer, read_settings: ReadSettings) -> None:
    """Add the commands to the command line."""
    _add_row_commands(app, read_settings)
    _add_task_commands(app, read_settings)
    _add_doctor(app, read_settings)


def _add_row_commands(app: typer.Typer, read_settings: ReadSettings) -> None:
    @app.command("rebuild-index")
    def rebuild_index(
        config: Config = None, data: Data = None, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False
    ) -> None:
        """Rebuild the search index from the rows, in the running server, or here if none runs."""
        from runtime.cli.client import Client, ServerUnreachable

        settings = read_settings(config, {"data": data}, [])

        async def work() -> dict[str, Any]:
            with contextlib.suppress(ServerUnreachable):
                async with Client(url, key=key) as client:
                    # The server at the URL is asked, even if it owns another directory; `keys`, which creates
                    # secrets, goes by the directory's lock instead.
                    return await client.post("/v1/index/rebuild")
            prepare_environment(settings)
            with open_memory_here(settings) as memory:
                return {"counts": await memory.index.rebuild()}

        run_command(work, as_json=as_json, render=lambda rebuilt: f"rebuilt: {_list_counts(rebuilt['counts'])}")

    @app.command("copy-rows")
    def copy_rows(config: Config = None, data: Data = None, as_json: Json = False) -> None:
        """Copy the rows of the data directory's file into the empty database that memory.database names."""
        settings = read_settings(config, {"data": data}, [])

        async def work() -> dict[str, Any]:
            from memory.errors import StoreError
            from memory.store import copy_to_server

            try:
                return {"counts": await asyncio.to_thread(copy_to_server, settings.data, settings.memory)}
            except (StoreError, ValueError) as error:
                raise Failure(str(error)) from error

        run_command(work, as_json=as_json, render=lambda copied: f"copied: {_list_nonzero(copied['counts'])}")


def _add_doctor(app: typer.Typer, read_settings: ReadSettings) -> None:
    @app.command(context_settings=OPEN_ENDED)
    def doctor(
        context: typer.Context,
        config: Config = None,
        data: Data = None,
        url: Url = DEFAULT_URL,
        key: Key = None,
        as_json: Json = False,
    ) -> None:
        """Check everything that answers depend on; without a running server, this starts an engine for one token."""
        from runtime.cli import render
        from runtime.cli.client import Client, ServerUnreachable

        settings = read_settings(config, {"data": data}, context.args)

        async def work() -> dict[str, Any]:
            with contextlib.suppress(ServerUnreachable):
                async with Client(url, key=key) as client:
                    return await client.get("/v1/doctor")
            prepare_environment(settings)
            phases = render.Phases(progress_console(as_json), is_silent=as_json)
            try:
                return await examine(settings, phases)
            finally:
                phases.end()

        diagnosis = run_command(work, as_json=as_json, render=render.doctor_table)
        if not diagnosis["is_ok"]:
            raise typer.Exit(1)


def _add_task_commands(app: typer.Typer, read_settings: ReadSettings) -> None:
    tasks = typer.Typer(help="Task files: environments of your own (docs/tasks.md).", no_args_is_help=True)
    app.add_typer(tasks, name="tasks")
    _add_make(tasks)
    _add_check(tasks, read_settings)
    _add_demonstrations(tasks, read_settings)


def _add_make(tasks: typer.Typer) -> None:
    @tasks.command()
    def make(
        benchmark: Annotated[
            str, typer.Argument(help="agentbench-db, agentbench-os, beerqa, bfcl, gsm8k, humaneval, math500 or mbpp.")
        ],
        source: Annotated[Path, typer.Argument(help="The published files: a folder, or one of them.")],
        out: Annotated[Path, typer.Argument(help="The task file to write, e.g. bfcl.jsonl.")],
        as_json: Json = False,
    ) -> None:
        """Make a task file of a published benchmark. Test sets become held-out tasks."""

        async def work() -> dict[str, Any]:
            from dataclasses import asdict

            from runtime.environments.converters.make import make_task_file

            try:
                file = await asyncio.to_thread(make_task_file, benchmark, source, out)
            except (ValueError, OSError) as error:
                raise Failure(str(error)) from error
            return {**asdict(file), "path": str(file.path)}

        run_command(work, as_json=as_json, render=_describe_tasks)


def _add_check(tasks: typer.Typer, read_settings: ReadSettings) -> None:
    @tasks.command()
    def check(
        file: Annotated[Path, typer.Argument(help="A task file.")], config: Config = None, as_json: Json = False
    ) -> None:
        """Check every row of a task file, and grade its demonstrations. Exits with 1 if one of them is wrong."""
        settings = read_settings(config, {}, [])

        async def work() -> dict[str, Any]:
            from dataclasses import asdict

            from runtime.environments.registry import load_resources
            from runtime.environments.task_files.check import check_task_file

            try:
                return asdict(await check_task_file(file, load_resources(file, settings.environments)))
            except ValueError as error:
                raise Failure(str(error)) from error

        if run_command(work, as_json=as_json, render=_describe_tasks)["problems"]:
            raise typer.Exit(1)


def _add_demonstrations(tasks: typer.Typer, read_settings: ReadSettings) -> None:
    @tasks.command()
    def demonstrations(
        environment: Annotated[str, typer.Argument(help="An environment of the configuration.")],
        out: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
        config: Config = None,
        limit: Annotated[int, typer.Option(min=1, help="Practice tasks, the first ones.")] = 10_000,
        as_json: Json = False,
    ) -> None:
        """Write the demonstrations of practice tasks as rows of the format `ratchet`."""
        settings = read_settings(config, {}, [])

        async def work() -> dict[str, Any]:
            from runtime.environments.demonstrations import write_demonstrations

            try:
                written = await write_demonstrations(settings.environments, environment, out, num_tasks=limit)
            except (ValueError, OSError) as error:
                raise Failure(str(error)) from error
            return {"path": str(out), "num_written": len(written.rows), "failures": written.failures}

        run_command(work, as_json=as_json, render=_describe_demonstrations)


def _describe_tasks(counted: Mapping[str, Any]) -> str:
    lines = [
        f"{counted['num_tasks']} tasks: {_list_counts(counted['splits'])}",
        f"kinds: {_list_counts(counted['kinds'])}",
    ]
    if "graders" in counted:
        lines.append(f"graders: {_list_counts(counted['graders'])}")
        wrong = len(counted["problems"])
        lines.append(f"{counted['num_demonstrations']} demonstrations graded, {wrong} of them wrong")
    named = (line for key in ("left_out", "problems", "warnings") for line in counted.get(key, ()))
    return "\n".join([*lines, *named])


def _describe_demonstrations(written: Mapping[str, Any]) -> str:
    failed = [f"left out: {failure}" for failure in written["failures"]]
    return "\n".join([f"{written['num_written']} demonstrations in {written['path']}", *failed])


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _list_nonzero(counts: Mapping[str, int]) -> str:
    return _list_counts({name: count for name, count in counts.items() if count})


async def examine(settings: RuntimeSettings, phases: Phases) -> dict[str, Any]:
    """Check everything without a server."""
    from dataclasses import asdict

    from memory.errors import StorageError
    from runtime import doctor as checks
    from runtime.engine.process import Engine
    from runtime.errors import EngineError

    try:
        memory = open_memory_here(settings)
    except Failure as failure:
        if not isinstance(failure.__cause__, StorageError):  # another process has the directory
            raise
        lost = checks.HealthCheck("storage", False, str(failure), "the message says what can be done")
        return {"is_ok": False, "checks": [asdict(lost)]}
    with memory:
        phases.begin("checking memory")
        results = await asyncio.to_thread(checks.check_at_rest, memory)
        made_for = memory.policies.find_base_model()
        engine = Engine(settings.engine, memory.data_dir, made_for=made_for, on_progress=phases.begin)
        try:
            await engine.start()
            results += await checks.check_engine(engine)
        except (EngineError, ValueError, OSError) as error:
            results.append(checks.HealthCheck("engine", False, str(error), f"read {engine.log_path}"))
        finally:
            await engine.stop()
    return {"is_ok": all(check.is_ok for check in results), "checks": [asdict(check) for check in results]}


def open_memory_here(settings: RuntimeSettings) -> Memory:
    """Open memory for one command. Raises Failure when another process has the directory."""
    from memory.errors import StoreError

    try:
        return open_memory(settings)
    except StoreError as error:
        raise Failure(str(error)) from error


def refuse_written_password(database: str | None) -> None:
    """Raise Failure for a database's password in a file or on the command line, where others may read it."""
    if database is None:
        return
    from memory.storage.dialects import holds_password

    if holds_password(database):
        raise Failure(
            "memory.database holds a password: take it out and give it as PGPASSWORD, or give the whole URL as the "
            "environment variable RATCHET_MEMORY__DATABASE",
            exit_code=2,
        )
