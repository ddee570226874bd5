"""Opens all configured tools at the start and closes them at the end.

Invariants: names are unique; a tool that cannot be offered fails the start with a message that names the remedy;
functions count as having side effects unless the configuration says otherwise.
"""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from runtime.config import ToolLimits, ToolsConfig
from runtime.errors import ToolRefused
from runtime.tools.base import Tool
from runtime.tools.documents import FindPassages, document_search
from runtime.tools.functions import functions_at, tool_from_function
from runtime.tools.sandbox import SOURCE as PYTHON_SOURCE
from runtime.tools.sandbox import check_sandbox, python_tool
from runtime.tools.web import page_fetcher

if TYPE_CHECKING:
    from runtime.tools.mcp import McpServer

MAX_CONCURRENCY = 16
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # as OpenAI's API defines it

log = structlog.get_logger()


class Toolbox:
    """The server's tools. `tools` is empty before `open`."""

    def __init__(self, config: ToolsConfig, find_passages: FindPassages, log_dir: Path) -> None:
        self.tools: list[Tool] = []
        self._config = config
        self._find_passages = find_passages
        self._log_dir = log_dir
        self._servers: list[McpServer] = []

    async def open(self) -> None:
        """Create every tool. If one cannot be offered, all that were opened are closed again.

        Raises:
            ToolRefused: a tool cannot be offered.
        """
        try:
            tools = [*await asyncio.to_thread(self._make_local_tools), *await self._open_mcp_servers()]
            require_unique(tools)
            self.tools[:] = with_limits(tools, self._config.limits)  # in place: the agent holds this list
            for tool in self.tools:
                if tool.source == PYTHON_SOURCE:
                    await check_sandbox(tool)
        except BaseException:  # also cancellation: MCP servers that were started must not outlive it
            await self.close()
            raise
        with_side_effects = [tool.name for tool in self.tools if tool.has_side_effects]
        log.info("tools are ready", tools=[tool.name for tool in self.tools], with_side_effects=with_side_effects)

    async def close(self) -> None:
        """Close the MCP connections; this stops the servers that were started here."""
        servers, self._servers = self._servers, []
        await asyncio.gather(*(server.close() for server in servers))

    def _make_local_tools(self) -> list[Tool]:
        """Create the tools that need no MCP server. Blocks, because it imports the operator's modules."""
        tools = [tool for path in self._config.functions for tool in tools_at(path)]
        if self._config.documents:
            tools.append(document_search(self._find_passages))
        if self._config.web:
            tools.append(page_fetcher())
        if self._config.python:
            tools.append(python_tool())
        return tools

    async def _open_mcp_servers(self) -> list[Tool]:
        if not self._config.mcp:
            return []
        mcp = await asyncio.to_thread(importlib.import_module, "runtime.tools.mcp")  # its SDK takes a second to load
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._servers = [mcp.McpServer(name, config, self._log_dir) for name, config in self._config.mcp.items()]
        # With `return_exceptions`, so that all have ended before the first failure closes them.
        results = await asyncio.gather(*(server.open() for server in self._servers), return_exceptions=True)
        tools: list[Tool] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            tools += result
        return tools


def tools_at(path: str) -> list[Tool]:
    """Return the tools at `package.module:function` or in `package.module`.

    Raises:
        ToolRefused: there is no such function, or its signature has no JSON schema.
    """
    source = f"tools.functions {path!r}"
    functions = functions_at(path)
    try:
        return [
            tool_from_function(function, has_side_effects=True, max_concurrency=MAX_CONCURRENCY, source=source)
            for function in functions
        ]
    except ValueError as error:
        raise ToolRefused(f"{source}: {error}") from error


def require_unique(tools: Sequence[Tool]) -> None:
    """Raise ToolRefused if two tools have the same name, or one has a name that OpenAI's API does not allow."""
    known: dict[str, Tool] = {}
    for tool in tools:
        if not TOOL_NAME.fullmatch(tool.name):
            raise ToolRefused(
                f"{tool.name!r} of {tool.source} cannot be a tool's name: up to 64 letters, digits, _ and - are"
            )
        if tool.name in known:
            raise ToolRefused(
                f"two tools are called {tool.name!r}: one of {known[tool.name].source}, one of {tool.source}; "
                "rename one, or give an MCP server a prefix"
            )
        known[tool.name] = tool


def with_limits(tools: Sequence[Tool], limits: dict[str, ToolLimits]) -> list[Tool]:
    """Return the tools with the configured limits.

    Raises:
        ToolRefused: the configuration limits a tool that does not exist.
    """
    names = [tool.name for tool in tools]
    if unknown := sorted(limits.keys() - set(names)):
        known = ", ".join(map(repr, names)) or "none"
        raise ToolRefused(f"tools.limits names {unknown[0]!r}, which is no tool; the tools are: {known}")
    return [_limited(tool, limits[tool.name]) if tool.name in limits else tool for tool in tools]


def _limited(tool: Tool, limits: ToolLimits) -> Tool:
    # All other settings of `ToolLimits` must have the names of `Tool`'s fields.
    fields = {"side_effects": "has_side_effects", "trusted": "is_trusted"}
    changes: dict[str, Any] = limits.model_dump(exclude_none=True)
    return replace(tool, **{fields.get(name, name): value for name, value in changes.items()})
