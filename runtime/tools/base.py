"""What a tool is, and a call that always comes back.

Refuses to know where a tool comes from, which episode a call belongs to, and what becomes of its result.
Flow of a call: parse the arguments -> check them against the schema -> take a place -> call, within a deadline -> cut
what is too long.
Invariant: `run_tool` returns. A tool that raises, hangs, floods or is called wrongly yields text that tells the model
so.
"""

from __future__ import annotations

import asyncio
import json
import re
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jsonschema
import referencing
from referencing.exceptions import Unresolvable

from memory.trust import UntrustedText
from runtime.errors import ToolError

DEFAULT_TIMEOUT_SECONDS = 30.0
MAX_ERROR_CHARS = 2_000


@dataclass(frozen=True)
class Tool:
    """One thing the agent can do. `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    call: Callable[[dict[str, Any]], Awaitable[str]]
    """Given arguments that fit the schema. A Future that refuses to be cancelled keeps its place until it is done."""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    """For one call, the wait for a place included."""
    has_side_effects: bool = False
    """Whether it changes anything outside of its episode. Then only an episode that somebody asked for calls it."""
    is_trusted: bool = True
    """Whether its results are the operator's to answer for. Text that others write (a web page, an MCP server) is
    untrusted: an episode that read it teaches nothing until an operator approves it."""
    max_output_chars: int = 20_000
    max_concurrency: int | None = None
    """Most calls at once, of all episodes together."""
    source: str = "this server"
    """Where it comes from, for messages."""
    call_for: Callable[[str, dict[str, Any]], Awaitable[str]] | None = None
    """Instead of `call`, for a tool that shows what belongs to a tenant: told whose episode it is."""

    def definition(self) -> dict[str, Any]:
        """Return the tool as the model is told of it, in OpenAI's form."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @cached_property
    def validator(self) -> jsonschema.Draft202012Validator:
        # An empty registry: by default jsonschema would fetch a remote $ref, wherever it points.
        return jsonschema.Draft202012Validator(self.parameters, registry=referencing.Registry())

    @cached_property
    def places(self) -> asyncio.Semaphore | None:
        """One for each call that may be under way."""
        return None if self.max_concurrency is None else asyncio.Semaphore(self.max_concurrency)


@dataclass(frozen=True)
class ToolResult:
    """What the model reads, and what went wrong, if anything. `is_invalid`: the call itself was malformed."""

    content: str
    error: str | None = None
    is_invalid: bool = False
    is_trusted: bool = True
    """False where text from elsewhere may be in it, errors included: they quote what was answered."""


async def run_tool(tool: Tool, arguments_json: str, *, tenant: str = "") -> ToolResult:
    """Call `tool` with arguments as the model wrote them; return its result, or what was wrong in words."""
    try:
        arguments = parse_arguments(arguments_json)
        problem = jsonschema.exceptions.best_match(tool.validator.iter_errors(arguments))
    except ValueError as error:
        return invalid(str(error))
    except (Unresolvable, RecursionError, re.error) as error:
        return failed(f"{tool.name!r} cannot be called: {_describe(error)}")
    if problem is not None:
        return invalid(f"the arguments of {tool.name!r} do not fit its schema: {problem.json_path}: {problem.message}")

    deadline = asyncio.get_running_loop().time() + tool.timeout_seconds
    try:
        async with asyncio.timeout_at(deadline):
            if tool.places is not None:
                await tool.places.acquire()
    except TimeoutError:
        return failed(f"TimeoutError: {tool.name!r} is busy: no place came free in {tool.timeout_seconds:g} seconds")
    # A task, not `except Exception`: whatever a tool raises is data here, and our own cancellation is not.
    asked = tool.call(arguments) if tool.call_for is None else tool.call_for(tenant, arguments)
    running = asyncio.ensure_future(asked)
    running.add_done_callback(lambda ended: _leave(tool, ended))
    try:
        await asyncio.wait({running}, timeout=deadline - asyncio.get_running_loop().time())
        result = _judge(tool, running)
        return replace(result, is_trusted=result.is_trusted and tool.is_trusted)
    finally:
        running.cancel()


def _leave(tool: Tool, ended: asyncio.Future[str]) -> None:
    """Give the place back, when the call has really ended: one that hangs on still uses what the limit protects."""
    if tool.places is not None:
        tool.places.release()
    if not ended.cancelled():
        ended.exception()  # seen, even when nobody waits any more


def _judge(tool: Tool, running: asyncio.Future[str]) -> ToolResult:
    if not running.done():
        return failed(f"TimeoutError: {tool.name!r} gave no result within {tool.timeout_seconds:g} seconds")
    if running.cancelled():
        return failed(f"CancelledError: {tool.name!r} gave up")
    if (error := running.exception()) is not None:
        return failed(_describe(error))
    result = running.result()
    if not isinstance(result, str):
        return failed(f"{tool.name!r} returned {type(result).__name__}, not text")
    return ToolResult(_cut(result, tool.max_output_chars), is_trusted=not isinstance(result, UntrustedText))


def parse_arguments(arguments_json: str) -> dict[str, Any]:
    """Return the arguments of a call. Raises ValueError when they are not a JSON object."""
    try:
        arguments = json.loads(arguments_json or "{}")
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"the arguments {_shorten(arguments_json)} are not valid JSON") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments {_shorten(arguments_json)} are not a JSON object")
    return arguments


def invalid(message: str) -> ToolResult:
    """Return the result of a call that was malformed."""
    return ToolResult(f"Error: {_cut(message, MAX_ERROR_CHARS)}", _cut(message, MAX_ERROR_CHARS), is_invalid=True)


def failed(message: str) -> ToolResult:
    """Return the result of a sound call that went wrong."""
    return ToolResult(f"Error: {_cut(message, MAX_ERROR_CHARS)}", error=_cut(message, MAX_ERROR_CHARS))


def _describe(error: BaseException) -> str:
    if isinstance(error, ToolError):
        return str(error)
    # Not str(error): that is the tool's own code again, and may raise.
    return "".join(traceback.format_exception_only(error)).strip()


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n[{len(text) - max_chars} more characters were cut]"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
