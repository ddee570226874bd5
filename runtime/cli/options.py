"""Options that the commands share, and requests made with them.

Hazard: nothing heavy may be imported at module level; a client command must start within a second.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.output import BAD_USAGE, Failure, Renderer, run_command

if TYPE_CHECKING:
    from runtime.cli.client import Client, QueryValue
    from runtime.config import RuntimeSettings

# Port and host of `ServerConfig` (runtime/config.py), and equal to client.py's.
DEFAULT_URL = "http://127.0.0.1:8080"

Url = Annotated[str, typer.Option("--url", envvar="RATCHET_URL", help="The server's address.")]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="RATCHET_KEY", show_envvar=True, help="An API key, if the server requires one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

Config = Annotated[Path | None, typer.Option("-c", "--config", help="A TOML file; ./ratchet.toml if it exists.")]
Data = Annotated[str | None, typer.Option("--data", help="The data directory (.ratchet).")]

OPEN_ENDED = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands that accept every setting as --section.key value."""


ReadSettings = Callable[[Path | None, dict[str, str | None], list[str]], "RuntimeSettings"]
"""(configuration file, options given by name, other flags) -> settings. Raises Failure."""


def connect(url: str, key: str | None) -> Client:
    """Return a client of the server at `url`."""
    from runtime.cli.client import Client

    return Client(url, key=key)


def call_and_print(
    call: Callable[[Client], Awaitable[dict[str, Any]]], url: str, key: str | None, as_json: bool, render: Renderer
) -> None:
    """Make one call of the server and print its answer. Raises: Failure."""

    async def work() -> dict[str, Any]:
        async with connect(url, key) as client:
            return await call(client)

    run_command(work, as_json=as_json, render=render)


def get_and_print(path: str, url: str, key: str | None, as_json: bool, render: Renderer, **query: QueryValue) -> None:
    """Send a GET request and print the answer. Raises: Failure."""
    call_and_print(lambda client: client.get(path, **query), url, key, as_json, render)


def post_and_print(
    path: str, url: str, key: str | None, as_json: bool, render: Renderer, body: dict[str, Any] | None = None
) -> None:
    """Send a POST request and print the answer. Raises: Failure."""
    call_and_print(lambda client: client.post(path, body), url, key, as_json, render)


def is_on(option: str, value: str) -> bool:
    """Return whether an option is `on`. Raises: Failure unless it is `on` or `off`."""
    if value not in ("on", "off"):
        raise Failure(f"{option} is on or off, not {value!r}", exit_code=BAD_USAGE)
    return value == "on"
