"""Commands that work on the data directory itself: rebuild-index, copy-rows, doctor.

Invariant: the embedded files have one owner process, so rebuild-index and doctor ask the running server first and open
the directory only if none answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
        lost = checks.Check("storage", False, str(failure), "the message says what can be done")
        return {"is_ok": False, "checks": [asdict(lost)]}
    with memory:
        phases.begin("checking memory")
        results = await asyncio.to_thread(checks.check_at_rest, memory)
        engine = Engine(settings.engine, memory.data_dir, on_progress=phases.begin)
        try:
            await engine.start()
            results += await checks.check_engine(engine)
        except (EngineError, ValueError, OSError) as error:
            results.append(checks.Check("engine", False, str(error), f"read {engine.log_path}"))
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
