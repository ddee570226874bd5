"""Every tool that the configuration names, opened together and closed together.

Refuses to know what a tool does; each kind has a file of its own.
Invariants: names are unique; whatever cannot be offered is refused at the start, by name and with the mend; what
nobody calls harmless is taken to have side effects.
"""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

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
A_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what OpenAI's API calls one

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
        """Make every tool. What was opened is closed again when one is refused.

        Raises:
            ToolRefused: a tool cannot be offered.
        """
        try:
            found = [*await asyncio.to_thread(self._own_tools), *await self._from_servers()]
            self.tools[:] = with_limits(unique(found), self._config.limits)
            for tool in self.tools:
                if tool.source == PYTHON_SOURCE:
                    await check_sandbox(tool)
        except BaseException:
            await self.close()
            raise
        acting = [tool.name for tool in self.tools if tool.has_side_effects]
        log.info("tools are ready", tools=[tool.name for tool in self.tools], with_side_effects=acting)

    async def close(self) -> None:
        """Leave the MCP servers, and stop those that were started here."""
        servers, self._servers = self._servers, []
        await asyncio.gather(*(server.close() for server in servers))

    def _own_tools(self) -> list[Tool]:
        """Make the tools that need no server. Blocks: it imports what people wrote."""
        tools = [tool for path in self._config.functions for tool in tools_at(path)]
        if self._config.documents:
            tools.append(document_search(self._find_passages))
        if self._config.web:
            tools.append(page_fetcher())
        if self._config.python:
            tools.append(python_tool())
        return tools

    async def _from_servers(self) -> list[Tool]:
        if not self._config.mcp:
            return []
        mcp = await asyncio.to_thread(importlib.import_module, "runtime.tools.mcp")  # its SDK takes a second to load
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._servers = [mcp.McpServer(name, config, self._log_dir) for name, config in self._config.mcp.items()]
        opened = await asyncio.gather(*(server.open() for server in self._servers), return_exceptions=True)
        for outcome in opened:
            if isinstance(outcome, BaseException):
                raise outcome
        return [tool for tools in opened for tool in tools]


def tools_at(path: str) -> list[Tool]:
    """Return the tools at `package.module:function` or in `package.module`.

    Raises:
        ToolRefused: there are none, or one has a signature that no schema describes.
    """
    source = f"tools.functions {path!r}"
    functions = functions_at(path)
    try:
        return [
            tool_from_function(one, has_side_effects=True, max_concurrency=MAX_CONCURRENCY, source=source)
            for one in functions
        ]
    except ValueError as error:
        raise ToolRefused(f"{source}: {error}") from error


def unique(tools: Sequence[Tool]) -> list[Tool]:
    """Return the tools. Raises ToolRefused for two of one name, and for a name that no model may call."""
    known: dict[str, Tool] = {}
    for tool in tools:
        if not A_NAME.fullmatch(tool.name):
            raise ToolRefused(
                f"{tool.name!r} of {tool.source} cannot be a tool's name: up to 64 letters, digits, _ and - are"
            )
        if tool.name in known:
            raise ToolRefused(
                f"two tools are called {tool.name!r}: one of {known[tool.name].source}, one of {tool.source}; "
                "rename one, or give an MCP server a prefix"
            )
        known[tool.name] = tool
    return list(known.values())


def with_limits(tools: Sequence[Tool], limits: dict[str, ToolLimits]) -> list[Tool]:
    """Return the tools with the limits that the configuration gives them.

    Raises:
        ToolRefused: there are limits for a tool that isn't there.
    """
    names = [tool.name for tool in tools]
    if strays := sorted(limits.keys() - set(names)):
        known = ", ".join(map(repr, names)) or "none"
        raise ToolRefused(f"tools.limits names {strays[0]!r}, which is no tool; the tools are: {known}")
    return [replace(tool, **_changes(limits[tool.name])) if tool.name in limits else tool for tool in tools]


def _changes(limits: ToolLimits) -> dict[str, object]:
    given = limits.model_dump(exclude_none=True)
    names = {"side_effects": "has_side_effects", "trusted": "is_trusted"}
    return {names.get(name, name): value for name, value in given.items()}
