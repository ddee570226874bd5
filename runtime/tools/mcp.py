"""Makes tools of MCP servers, started here (stdio) or remote (streamable HTTP), through the official SDK.

`open` connects and lists the tools once; calls share the connection.
Invariants: a server that is unavailable at the start raises ToolRefused with its name. A server that dies later fails
the calls under way, and the next call reconnects, with exponential backoff while it keeps failing.
Hazard: the SDK requires that the task that opened a connection also closes it; see `_Connection`.
"""

from __future__ import annotations

import asyncio
import os
import re
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
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
from runtime.tools.functions import result_as_text

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
MAX_TOOLS_PAGES = 50
MAX_CONCURRENCY = 16
LOG_TAIL_CHARS = 600
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_-]")

# The SDK raises RuntimeError for a result that violates the protocol.
PROTOCOL_ERRORS = (MCPError, RuntimeError, ValidationError)
CONNECTION_ERRORS = (anyio.ClosedResourceError, anyio.BrokenResourceError, httpx2.HTTPError)

log = structlog.get_logger()


class McpServer:
    """One MCP server. Reconnects after the server has died."""

    def __init__(
        self, name: str, config: McpServerConfig, log_dir: Path, *, clock: Callable[[], float] | None = None
    ) -> None:
        self.name = name
        self._config = config
        self._log_path = log_dir / f"mcp-{name}.log"
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None
        self._open_connections: set[_Connection] = set()
        """The current connection and earlier ones that are still closing."""
        self._num_failures = 0
        self._retry_at = 0.0

    async def open(self) -> list[Tool]:
        """Connect, and return the server's tools.

        Raises:
            ToolRefused: the server cannot be started or reached, doesn't speak MCP, or has a tool with an invalid
                schema.
        """
        try:
            connection = await self._connect()
            async with asyncio.timeout(self._config.startup_seconds):
                listed = await _list_tools(connection.client)
        except (ToolError, TimeoutError, *PROTOCOL_ERRORS, *CONNECTION_ERRORS) as error:
            raise ToolRefused(
                f"the MCP server {self.name!r} ({self._address}) is not available: {error or 'it does not answer'}; "
                f"check tools.mcp.{self.name} in the configuration{self._log_tail()}"
            ) from error
        # A missing name is an error, because a misspelt one would silently offer nothing.
        only = self._config.only
        if only is not None and (missing := set(only) - {tool.name for tool in listed}):
            raise ToolRefused(
                f"the MCP server {self.name!r} has no tool {min(missing)!r}; it has: "
                f"{', '.join(repr(tool.name) for tool in listed)}"
            )
        return [self._as_tool(tool) for tool in listed if only is None or tool.name in only]

    async def close(self) -> None:
        """Close all connections; this stops a server that was started here."""
        self._connection = None
        for connection in self._open_connections:
            connection.close()
        if self._open_connections:
            await asyncio.wait({connection.task for connection in self._open_connections})

    async def call(self, tool_name: str, arguments: dict[str, Any]) -> str:
        """Call a tool. Raises: ToolError if the tool fails or the server died."""
        connection = await self._ensure_connection()
        try:
            result = await connection.client.call_tool(tool_name, arguments)
        except PROTOCOL_ERRORS as error:
            # A death shows in three ways, by transport and moment: the task ended, this code, or an error below.
            if connection.has_ended or (isinstance(error, MCPError) and error.code == types.CONNECTION_CLOSED):
                raise self._note_death(connection, error) from error
            raise ToolError(neutralise(str(error))) from error
        except CONNECTION_ERRORS as error:
            raise self._note_death(connection, error) from error
        self._num_failures, self._retry_at = 0, 0.0
        text = neutralise(as_text(result))  # the server may pass on text of strangers
        if result.is_error:
            raise ToolError(text or "the tool failed without a message")
        return text

    @property
    def _address(self) -> str:
        return self._config.url or " ".join(self._config.command)

    async def _ensure_connection(self) -> _Connection:
        """Return the connection; reconnect if there is none and the backoff has passed. Raises: ToolError."""
        # Held while connecting, so that concurrent calls start one process and not one each.
        async with self._connecting:
            if self._connection is not None and not self._connection.has_ended:
                return self._connection
            self._drop_connection()
            wait = self._retry_at - self._clock()
            if wait > 0:
                raise ToolError(f"the MCP server {self.name!r} is down; it is tried again in {wait:.1f} seconds")
            try:
                return await self._connect()
            except ToolError as error:
                self._back_off()
                raise ToolError(f"the MCP server {self.name!r} is down: {error}") from error

    async def _connect(self) -> _Connection:
        connection = _Connection(lambda: _open_client(self._config, self._log_path))
        self._open_connections.add(connection)
        connection.task.add_done_callback(lambda _: self._open_connections.discard(connection))
        await connection.wait_until_ready(self._config.startup_seconds)
        self._connection = connection
        return connection

    def _note_death(self, connection: _Connection, error: Exception) -> ToolError:
        if connection is self._connection:  # concurrent calls see the same death; only the first one counts
            self._drop_connection()
            self._back_off()
            log.warning("MCP server died", server=self.name, error=_describe(error))
        return ToolError(
            f"the MCP server {self.name!r} died during the call ({_describe(error)}); the next call starts it anew"
        )

    def _back_off(self) -> None:
        """Delay the next connection. After a first failure it is immediate; each further one doubles the pause."""
        if self._num_failures:
            pause = FIRST_PAUSE_SECONDS * 2 ** min(self._num_failures - 1, 10)
            self._retry_at = self._clock() + min(pause, LONGEST_PAUSE_SECONDS)
        self._num_failures += 1

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _as_tool(self, listed: types.Tool) -> Tool:
        name = self._config.prefix + NOT_IN_A_NAME.sub("_", listed.name)
        try:
            jsonschema.Draft202012Validator.check_schema(listed.input_schema)
        except jsonschema.SchemaError as error:
            raise ToolRefused(
                f"the tool {listed.name!r} of the MCP server {self.name!r} has an invalid schema: {error.message}; "
                f"leave it out with tools.mcp.{self.name}.only"
            ) from error

        async def call(arguments: dict[str, Any]) -> str:
            return await self.call(listed.name, arguments)

        return Tool(
            name,
            neutralise(listed.description or ""),
            listed.input_schema,
            call,
            # Without the read-only hint a tool counts as having side effects: practice must not try it out.
            has_side_effects=not (listed.annotations and listed.annotations.read_only_hint),
            is_trusted=False,  # an operator may override this with tools.limits
            max_concurrency=MAX_CONCURRENCY,
            source=f"the MCP server {self.name!r}",
        )

    def _log_tail(self) -> str:
        """Return the end of the log of a server that was started here, for messages."""
        if not self._config.command or not self._log_path.exists():
            return ""
        tail = self._log_path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARS:].strip()
        return f"; the end of its log: {tail}" if tail else f"; its log {self._log_path} is empty"


class _Connection:
    """One connection, opened and closed by a task of its own, because the SDK requires the same task for both."""

    def __init__(self, open_client: Callable[[], AbstractAsyncContextManager[Client]]) -> None:
        self.client: Client
        self._is_ready = asyncio.Event()
        self._is_closing = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(open_client))
        # Retrieves the exception, which asyncio would otherwise log.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _run(self, open_client: Callable[[], AbstractAsyncContextManager[Client]]) -> None:
        async with open_client() as self.client:
            self._is_ready.set()
            await self._is_closing.wait()

    @property
    def has_ended(self) -> bool:
        return self.task.done()

    async def wait_until_ready(self, timeout_seconds: float) -> None:
        """Wait until the connection is open. Raises: ToolError if it fails or takes too long."""
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

    def close(self) -> None:
        """Begin to close; `task` ends when the connection is closed."""
        self._is_closing.set()
        if not self._is_ready.is_set():
            self.task.cancel()


@asynccontextmanager
async def _open_client(config: McpServerConfig, log_path: Path) -> AsyncIterator[Client]:
    """Open a client over the configured transport."""
    async with AsyncExitStack() as stack:
        if config.url is not None:
            # Values come from environment variables, so that secrets are not in the configuration file.
            headers = {header: _from_environment(name) for header, name in config.headers.items()}
            timeout = httpx2.Timeout(30.0, read=300.0)  # a call may take minutes between two bytes
            http = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=timeout))
            transport = streamable_http_client(config.url, http_client=http)
        else:
            # Appended to and never rotated: the server's own output decides its size.
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
    # Bounded: a server could hand out cursors for ever.
    for _ in range(MAX_TOOLS_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def as_text(result: types.CallToolResult) -> str:
    """Return the text of a result; other content is replaced by a description in brackets."""
    parts = [_part_as_text(part) for part in result.content]
    if not parts and result.structured_content is not None:
        return result_as_text(result.structured_content)
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
    """Return the message of an error; for an exception group, of its first leaf."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ToolError | MCPError):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip()
