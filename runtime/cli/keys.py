"""The commands about API keys: create, list, revoke.

The data directory has one owner process. Therefore a command opens the directory if no process owns it, and otherwise
asks the server that does; with `--url` it asks that server and opens no file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.options import Config, Data, Json, Key, ReadSettings, connect
from runtime.cli.output import Failure, Renderer, run_command

if TYPE_CHECKING:
    from memory.records.keys import Keys
    from memory.schema import ApiKey
    from runtime.cli.client import Client

Server = Annotated[
    str | None,
    typer.Option("--url", envvar="RATCHET_URL", help="Use this server instead of the data directory."),
]


OpenKeys = Callable[[Path | None, str | None], "AbstractContextManager[Keys]"]
"""(configuration file, data directory) -> a context manager that opens the table of keys."""


def add_key_commands(app: typer.Typer, read_settings: ReadSettings) -> None:
    """Add the commands to the command line."""

    def open_keys(config: Path | None, data: str | None) -> AbstractContextManager[Keys]:
        from memory import store

        settings = read_settings(config, {"data": data}, [])
        return store.open_keys(settings.data, settings.memory)

    keys = typer.Typer(help="API keys with scopes and quotas: create, list, revoke.", no_args_is_help=True)
    app.add_typer(keys, name="keys")
    _add_create(keys, open_keys)
    _add_list_and_revoke(keys, open_keys)


def _add_create(keys: typer.Typer, open_keys: OpenKeys) -> None:
    @keys.command()
    def create(
        name: Annotated[str, typer.Argument(help="A name, for lists.")],
        scope: Annotated[list[str], typer.Option(help="infer, feedback, learn, teach or admin; may be repeated.")],
        tenant: Annotated[str, typer.Option(help="The tenant whose data it can access.")] = "",
        requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
        tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompt and output together.")] = None,
        config: Config = None,
        data: Data = None,
        url: Server = None,
        key: Key = None,
        as_json: Json = False,
    ) -> None:
        """Create a key and print it once. From the first one on, the server requires a key for every request; therefore
        an operator's key is created too if there is none."""
        limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}

        async def on_server(client: Client) -> dict[str, Any]:
            # Not repeatable: each attempt may have made a key whose secret nobody has seen.
            return await client.post("/v1/keys", {"name": name, "scopes": scope, "tenant": tenant, **limits})

        async def in_directory(keys: Keys) -> dict[str, Any]:
            (row, secret), operator_key = await keys.create_for_operator(name, scope, tenant=tenant, **limits)
            operator = None
            if operator_key is not None:
                operator_row, operator_secret = operator_key
                operator = {**_describe(operator_row), "key": operator_secret}
            return {**_describe(row), "key": secret, "operator": operator}

        _run(on_server, in_directory, lambda: open_keys(config, data), url, key, as_json, _render_created)


def _add_list_and_revoke(keys: typer.Typer, open_keys: OpenKeys) -> None:
    @keys.command("list")
    def list_keys(
        config: Config = None, data: Data = None, url: Server = None, key: Key = None, as_json: Json = False
    ) -> None:
        """List all keys, including revoked ones, without their secrets."""
        from runtime.cli import render

        async def on_server(client: Client) -> dict[str, Any]:
            return await client.get("/v1/keys")

        async def in_directory(keys: Keys) -> dict[str, Any]:
            return {"object": "list", "data": [_describe(row) for row in keys.select()]}

        _run(on_server, in_directory, lambda: open_keys(config, data), url, key, as_json, render.keys_table)

    @keys.command()
    def revoke(
        key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` names it.")],
        config: Config = None,
        data: Data = None,
        url: Server = None,
        key: Key = None,
        as_json: Json = False,
    ) -> None:
        """Revoke a key, permanently."""

        async def on_server(client: Client) -> dict[str, Any]:
            return await client.post(f"/v1/keys/{key_id}/revoke", is_repeatable=True)

        async def in_directory(keys: Keys) -> dict[str, Any]:
            return _describe(await keys.revoke(key_id))

        render = "{0[id]} ({0[name]}) opens nothing any more".format
        _run(on_server, in_directory, lambda: open_keys(config, data), url, key, as_json, render)


def _run(
    on_server: Callable[[Client], Awaitable[dict[str, Any]]],
    in_directory: Callable[[Keys], Awaitable[dict[str, Any]]],
    open_keys: Callable[[], AbstractContextManager[Keys]],
    url: str | None,
    key: str | None,
    as_json: bool,
    render: Renderer,
) -> None:
    """Use the server at `url`; without one, the data directory, or the server that owns it."""

    async def work() -> dict[str, Any]:
        if url is not None:
            async with connect(url, key) as client:
                return await on_server(client)
        from memory.errors import DataDirectoryInUse, StoreError

        try:
            # Opening takes the directory's lock, so that no server can start meanwhile.
            with open_keys() as keys:
                return await in_directory(keys)
        except DataDirectoryInUse as error:
            if error.url is None:
                raise Failure(f"{error}; or name its server with --url") from None
            async with connect(error.url, key) as client:
                return await on_server(client)
        except StoreError as error:
            raise Failure(str(error)) from None

    run_command(work, as_json=as_json, render=render)


def _render_created(created: dict[str, Any]) -> str:
    text, operator = _render_key(created), created.get("operator")
    if operator is None:
        return f"{text}\n\nThis is the only time the key is shown."
    return (
        f"{text}\n\nFrom now on every request needs a key, and the one above cannot manage keys. So that you are not "
        f"locked out, an operator's key was created too:\n\n{_render_key(operator)}\n\n"
        "This is the only time the two keys are shown. Keep the second for yourself."
    )


def _render_key(created: dict[str, Any]) -> str:
    scopes = ", ".join(created["scopes"])
    return f"{created['id']} ({created['name']}), tenant {created['tenant']!r}, for {scopes}\n\n  {created['key']}"


def _describe(row: ApiKey) -> dict[str, Any]:
    return row.model_dump(mode="json", exclude={"digest"})
