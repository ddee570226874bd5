"""The verbs about keys: create, list, revoke.

The embedded files have one owner process. So a verb opens the data directory when nobody has it, and asks the server
that has it else, never another one; with `--url` it asks that server and touches no file. Refuses to know how a key is
kept.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.output import Failure, perform
from runtime.cli.verbs import Config, Data, Json, Key, connect

if TYPE_CHECKING:
    from memory.records.keys import Keys
    from memory.schema import ApiKey
    from runtime.cli.client import Client

OpenKeys = Callable[[Path | None, str | None], "AbstractContextManager[Keys]"]
"""(configuration file, data directory) -> its keys, for as long as the context lasts."""

Server = Annotated[
    str | None,
    typer.Option("--url", envvar="RATCHET_URL", help="Ask this server, and leave --data alone."),
]


def add_key_verbs(app: typer.Typer, open_keys: OpenKeys) -> None:
    """Put the verbs on the command line."""
    keys = typer.Typer(help="Who may ask a server, for what, and how much.", no_args_is_help=True)
    app.add_typer(keys, name="keys")

    @keys.command()
    def create(
        name: Annotated[str, typer.Argument(help="Who will use it.")],
        scope: Annotated[list[str], typer.Option(help="infer, feedback, learn, teach or admin; may be repeated.")],
        tenant: Annotated[str, typer.Option(help="Whose data it opens.")] = "",
        requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
        tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompt and output together.")] = None,
        config: Config = None,
        data: Data = None,
        url: Server = None,
        key: Key = None,
        as_json: Json = False,
    ) -> None:
        """Make a key, and show it this once. From the first one on, the server asks everybody for a key; so an
        operator's key is made beside it where there is none."""
        limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}

        async def ask(client: Client) -> dict[str, Any]:
            return await client.post("/v1/keys", {"name": name, "scopes": scope, "tenant": tenant, **limits})

        async def do(keys: Keys) -> dict[str, Any]:
            (row, made), spare = await keys.create_for_operator(name, scope, tenant=tenant, **limits)
            operator = None if spare is None else {**_describe(spare[0]), "key": spare[1]}
            return {**_describe(row), "key": made, "operator": operator}

        _perform(ask, do, lambda: open_keys(config, data), url, key, as_json, _tell)

    @keys.command("list")
    def list_keys(
        config: Config = None, data: Data = None, url: Server = None, key: Key = None, as_json: Json = False
    ) -> None:
        """List all keys, revoked ones too; never the keys themselves."""
        from runtime.cli import render as show

        async def ask(client: Client) -> dict[str, Any]:
            return await client.get("/v1/keys")

        async def do(keys: Keys) -> dict[str, Any]:
            return {"object": "list", "data": [_describe(row) for row in keys.select()]}

        _perform(ask, do, lambda: open_keys(config, data), url, key, as_json, show.keys_table)

    @keys.command()
    def revoke(
        key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` names it.")],
        config: Config = None,
        data: Data = None,
        url: Server = None,
        key: Key = None,
        as_json: Json = False,
    ) -> None:
        """Have a key open nothing any more."""

        async def ask(client: Client) -> dict[str, Any]:
            return await client.post(f"/v1/keys/{key_id}/revoke", is_repeatable=True)

        async def do(keys: Keys) -> dict[str, Any]:
            return _describe(await keys.revoke(key_id))

        show = "{0[id]} ({0[name]}) opens nothing any more".format
        _perform(ask, do, lambda: open_keys(config, data), url, key, as_json, show)


def _perform(
    ask: Callable[[Client], Awaitable[dict[str, Any]]],
    do: Callable[[Keys], Awaitable[dict[str, Any]]],
    open_keys: Callable[[], AbstractContextManager[Keys]],
    url: str | None,
    key: str | None,
    as_json: bool,
    show: Callable[[dict[str, Any]], Any],
) -> None:
    """Ask the server at `url`; without one, do it in the data directory, or ask the server that has that."""

    async def work() -> dict[str, Any]:
        if url is not None:
            async with connect(url, key) as client:
                return await ask(client)
        from memory.errors import DataDirectoryInUse, StoreError

        try:
            with open_keys() as keys:
                return await do(keys)
        except DataDirectoryInUse as owned:
            if owned.url is None:
                raise Failure(f"{owned}; or name its server with --url") from None
            async with connect(owned.url, key) as client:
                return await ask(client)
        except StoreError as error:
            raise Failure(str(error)) from None

    perform(work, as_json=as_json, show=show)


def _tell(made: dict[str, Any]) -> str:
    text, operator = _tell_one(made), made.get("operator")
    if operator is None:
        return f"{text}\n\nThis is the only time the key is shown."
    return (
        f"{text}\n\nFrom now on everybody needs a key, and the one above cannot manage keys. So that you are not "
        f"locked out, an operator's key was made too:\n\n{_tell_one(operator)}\n\n"
        "This is the only time the two keys are shown. Keep the second for yourself."
    )


def _tell_one(made: dict[str, Any]) -> str:
    return (
        f"{made['id']} ({made['name']}), tenant {made['tenant']!r}, for {', '.join(made['scopes'])}\n\n  {made['key']}"
    )


def _describe(row: ApiKey) -> dict[str, Any]:
    return row.model_dump(mode="json", exclude={"digest"})
