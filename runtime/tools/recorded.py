"""Replaces tools with side effects in practice and held-out episodes by their recorded results.

Such episodes are played to learn and to measure; no client requested their effects.
Invariant: they never get a tool with side effects itself, only a replacement that returns the result of the same call
in a live episode, or an error if there is no recorded one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from memory.schema import Split
from runtime.errors import ToolError
from runtime.tools.base import Tool

FindResult = Callable[[str, dict[str, Any]], str | None]
"""(tool's name, arguments) -> the result of the same call in a live episode; None if there was none."""


def tools_for(split: Split, tools: Sequence[Tool], find_result: FindResult) -> list[Tool]:
    """Return the tools for an episode of a split, with those that have side effects replaced unless it is live."""
    if split is Split.LIVE:
        return list(tools)
    return [recorded_tool(tool, find_result) if tool.has_side_effects else tool for tool in tools]


def recorded_tool(tool: Tool, find_result: FindResult) -> Tool:
    """Return a tool with the definition of `tool` that returns recorded results only."""

    async def call(arguments: dict[str, Any]) -> str:
        # In a thread: it reads the database.
        result = await asyncio.to_thread(find_result, tool.name, arguments)
        if result is None:
            raise ToolError(
                f"{tool.name!r} is not available here: it acts on the outside, and no result is recorded for these "
                "arguments"
            )
        return result

    # Without `call_for` as well: `run_tool` prefers it, and it would reach the real tool.
    return replace(tool, call=call, call_for=None)
