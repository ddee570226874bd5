"""What a tool with side effects is in a rehearsal: its record.

Practice and held-out episodes are rehearsals: they are played to learn and to measure, and nobody asked for what they
would do out there. So they never hold such a tool itself, only its stand-in, which answers what the same call with
the same arguments yielded when somebody did ask, or says that the tool is not available.

Refuses to know how records are kept, and what counts as a side effect: the tool says so.
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
"""Tool and arguments -> what a call in a live episode yielded; None where there was none."""


def tools_for(split: Split, tools: Sequence[Tool], find_result: FindResult) -> list[Tool]:
    """Return the tools that an episode may hold: in a rehearsal, stand-ins for those with side effects."""
    if split is Split.LIVE:
        return list(tools)
    return [stand_in(tool, find_result) if tool.has_side_effects else tool for tool in tools]


def stand_in(tool: Tool, find_result: FindResult) -> Tool:
    """Return a tool that looks like `tool` to the model and only ever reads the record."""

    async def call(arguments: dict[str, Any]) -> str:
        result = await asyncio.to_thread(find_result, tool.name, arguments)
        if result is None:
            raise ToolError(
                f"{tool.name!r} is not available here: it acts on the outside, and no result is recorded for these "
                "arguments"
            )
        return result

    return replace(tool, call=call, call_for=None)
