"""Tools of MCP servers, started here (stdio) or running elsewhere (streamable HTTP), by the official SDK.

Refuses to know what the tools do. The SDK is met in this file and nowhere else.
Flow: `open` connects and lists the tools once; each call goes over the connection that stands.
Invariants: a server that cannot be had at the start is refused by name; one that dies later costs the call it died in,
and the next call connects anew, after a pause that grows while it keeps dying.
"""

from __future__ import annotations

import asyncio
import os
import re
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, Any

import anyio
import httpx2
import jsonschema
import mcp_types as types
import structlog
from mcp import Client, MCPError
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from pydantic import ValidationError

from memory.chat_marks import neutralise
from runtime.config import McpServerConfig
from runtime.errors import ToolError, ToolRefused
from runtime.tools.base import Tool
from runtime.tools.functions import show

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
MAX_TOOLS_PAGES = 50
MAX_CONCURRENCY = 16
LOG_TAIL_CHARS = 600
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_-]")

COMPLAINTS = (MCPError, RuntimeError, ValidationError)  # RuntimeError is what the SDK raises for a result it dislikes
BREAKS = (anyio.ClosedResourceError, anyio.BrokenResourceError, httpx2.HTTPError)

log = structlog.get_logger()


class McpServer:
    """One server, connected as long as it lives and again when it has died."""

    def __init__(
        self, name: str, config: McpServerConfig, log_dir: Path, *, clock: Callable[[], float] | None = None
    ) -> None:
        self.name = name
        self._config = config
        self._log_path = log_dir / f"mcp-{name}.log"
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None
        self._past: set[_Connection] = set()
        self._num_failures = 0
        self._not_before = 0.0

    async def open(self) -> list[Tool]:
        """Connect, and return the server's tools.

        Raises:
            ToolRefused: it can't be started or reached, doesn't speak MCP, or offers what can't be a tool.
        """
        try:
            connection = await self._connect()
            async with asyncio.timeout(self._config.startup_seconds):
                listed = await _list_tools(connection.client)
        except (ToolError, TimeoutError, *COMPLAINTS, *BREAKS) as error:
            raise ToolRefused(
                f"the MCP server {self.name!r} ({self._place}) cannot be had: {error or 'it does not answer'}; "
                f"check tools.mcp.{self.name} in the configuration{self._logged()}"
            ) from error
        only = self._config.only
        if only is not None and (missing := set(only) - {tool.name for tool in listed}):
            raise ToolRefused(
                f"the MCP server {self.name!r} has no tool {min(missing)!r}; it has: "
                f"{', '.join(repr(tool.name) for tool in listed)}"
            )
        return [self._as_tool(tool) for tool in listed if only is None or tool.name in only]

    async def close(self) -> None:
        """Leave, and stop the server if it was started here."""
        self._connection = None
        for connection in self._past:
            connection.leave()
        if self._past:
            await asyncio.wait({connection.task for connection in self._past})

    async def call(self, tool_name: str, arguments: dict[str, Any]) -> str:
        """Call a tool. Raises ToolError: the tool says no, or the server died."""
        connection = await self._standing()
        try:
            result = await connection.client.call_tool(tool_name, arguments)
        except COMPLAINTS as error:
            if connection.has_ended or (isinstance(error, MCPError) and error.code == types.CONNECTION_CLOSED):
                raise self._note_death(connection, error) from error
            raise ToolError(neutralise(str(error))) from error
        except BREAKS as error:
            raise self._note_death(connection, error) from error
        self._num_failures, self._not_before = 0, 0.0
        text = neutralise(as_text(result))  # who wrote it, the server may not know either
        if result.is_error:
            raise ToolError(text or "the tool failed and does not say why")
        return text

    @property
    def _place(self) -> str:
        return self._config.url or " ".join(self._config.command)

    async def _standing(self) -> _Connection:
        """Return the connection; make one if there is none and it isn't too soon. Raises ToolError."""
        async with self._connecting:
            if self._connection is not None and not self._connection.has_ended:
                return self._connection
            self._drop()
            wait = self._not_before - self._clock()
            if wait > 0:
                raise ToolError(f"the MCP server {self.name!r} is down; it is tried again in {wait:.1f} seconds")
            try:
                return await self._connect()
            except ToolError as error:
                self._back_off()
                raise ToolError(f"the MCP server {self.name!r} is down: {error}") from error

    async def _connect(self) -> _Connection:
        connection = _Connection(lambda: _client(self._config, self._log_path))
        self._past.add(connection)
        connection.task.add_done_callback(lambda _: self._past.discard(connection))
        await connection.ready(self._config.startup_seconds)
        self._connection = connection
        return connection

    def _note_death(self, connection: _Connection, error: Exception) -> ToolError:
        if connection is self._connection:  # others of its calls may have noted it already
            self._drop()
            self._back_off()
            log.warning("MCP server died", server=self.name, error=_describe(error))
        return ToolError(
            f"the MCP server {self.name!r} died during the call ({_describe(error)}); the next call starts it anew"
        )

    def _back_off(self) -> None:
        """The first failure is mended at the next call; what fails again without a success gets longer pauses."""
        if self._num_failures:
            pause = FIRST_PAUSE_SECONDS * 2 ** min(self._num_failures - 1, 10)
            self._not_before = self._clock() + min(pause, LONGEST_PAUSE_SECONDS)
        self._num_failures += 1

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.leave()
            self._connection = None

    def _as_tool(self, listed: types.Tool) -> Tool:
        name = self._config.prefix + NOT_IN_A_NAME.sub("_", listed.name)
        try:
            jsonschema.Draft202012Validator.check_schema(listed.input_schema)
        except jsonschema.SchemaError as error:
            raise ToolRefused(
                f"the tool {listed.name!r} of the MCP server {self.name!r} has a schema that is none: {error.message}; "
                f"leave it out with tools.mcp.{self.name}.only"
            ) from error

        async def call(arguments: dict[str, Any]) -> str:
            return await self.call(listed.name, arguments)

        return Tool(
            name,
            neutralise(listed.description or ""),
            listed.input_schema,
            call,
            # What nobody calls read-only is taken to act: a rehearsal must not find out.
            has_side_effects=not (listed.annotations and listed.annotations.read_only_hint),
            is_trusted=False,  # an operator who runs the server may say otherwise (tools.limits)
            max_concurrency=MAX_CONCURRENCY,
            source=f"the MCP server {self.name!r}",
        )

    def _logged(self) -> str:
        """Return what a server that was started here said last."""
        if not self._config.command or not self._log_path.exists():
            return ""
        tail = self._log_path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARS:].strip()
        return f"; it said last: {tail}" if tail else f"; it said nothing in {self._log_path}"


class _Connection:
    """One connection, held by a task of its own: the SDK wants it left by the task that entered it."""

    def __init__(self, make_client: Callable[[], Any]) -> None:
        self.client: Client
        self._is_ready = asyncio.Event()
        self._leaving = asyncio.Event()
        self.task = asyncio.ensure_future(self._hold(make_client))
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # however it ends, it was seen

    async def _hold(self, make_client: Callable[[], Any]) -> None:
        async with make_client() as self.client:
            self._is_ready.set()
            await self._leaving.wait()

    @property
    def has_ended(self) -> bool:
        return self.task.done()

    async def ready(self, timeout_seconds: float) -> None:
        """Wait until it stands. Raises ToolError when it doesn't come to."""
        waiting = asyncio.ensure_future(self._is_ready.wait())
        try:
            await asyncio.wait({self.task, waiting}, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            if not self._is_ready.is_set():
                self.task.cancel()
        if self.task.done() and not self.task.cancelled() and (error := self.task.exception()) is not None:
            raise ToolError(_describe(error)) from error
        if not self._is_ready.is_set():
            raise ToolError(f"no connection within {timeout_seconds:g} seconds")

    def leave(self) -> None:
        """Begin to close."""
        self._leaving.set()
        if not self._is_ready.is_set():
            self.task.cancel()


@asynccontextmanager
async def _client(config: McpServerConfig, log_path: Path) -> AsyncIterator[Client]:
    """Open a client over the transport that the configuration says."""
    async with AsyncExitStack() as stack:
        if config.url is not None:
            headers = {header: _from_environment(name) for header, name in config.headers.items()}
            timeout = httpx2.Timeout(30.0, read=300.0)
            http = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=timeout))
            transport = streamable_http_client(config.url, http_client=http)
        else:
            log_file: IO[str] = stack.enter_context(log_path.open("a", encoding="utf-8"))
            program, *arguments = config.command
            environment = {name: _from_environment(name) for name in config.env}
            transport = stdio_client(
                StdioServerParameters(command=program, args=arguments, env=environment), errlog=log_file
            )
        yield await stack.enter_async_context(Client(transport))


def _from_environment(name: str) -> str:
    if name not in os.environ:
        raise ToolError(f"the environment variable {name!r} is not set: export it, or take it out of the configuration")
    return os.environ[name]


async def _list_tools(client: Client) -> list[types.Tool]:
    tools: list[types.Tool] = []
    cursor = None
    for _ in range(MAX_TOOLS_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def as_text(result: types.CallToolResult) -> str:
    """Return what a result says in words; what is no text is named."""
    parts = [_part_as_text(part) for part in result.content]
    if not parts and result.structured_content is not None:
        return show(result.structured_content)
    return "\n".join(parts)


def _part_as_text(part: types.ContentBlock) -> str:
    match part:
        case types.TextContent():
            return part.text
        case types.EmbeddedResource(resource=types.TextResourceContents() as resource):
            return resource.text
        case types.ResourceLink():
            return f"[resource {part.uri}]"
        case types.ImageContent() | types.AudioContent():
            return f"[{part.type}, {part.mime_type}: not shown]"
        case _:
            return f"[{part.type}: not shown]"


def _describe(error: BaseException) -> str:
    """Say what went wrong; of a group, what its first leaf says."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return (
        str(error)
        if isinstance(error, ToolError | MCPError)
        else "".join(traceback.format_exception_only(error)).strip()
    )
