"""The `Tool` type, and `run_tool`, which calls a tool with arguments that a model wrote.

Steps of a call: parse the arguments, validate them against the schema, acquire a slot, call with a deadline, truncate
the result.
Invariant: `run_tool` always returns. A tool that raises, hangs, returns too much or gets invalid arguments yields an
error text for the model.
Hazard: a blocking call cannot be cancelled; its slot stays occupied until it has really ended.
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
import jsonschema.exceptions
import referencing
from referencing.exceptions import Unresolvable

from memory.trust import UntrustedText
from runtime.errors import ToolError

DEFAULT_TIMEOUT_SECONDS = 30.0
MAX_ERROR_CHARS = 2_000


@dataclass(frozen=True)
class Tool:
    """A function that a model can call. `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    call: Callable[[dict[str, Any]], Awaitable[str]]
    """Receives arguments that match the schema. A Future that ignores cancellation keeps its slot until it is done."""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    """Maximum duration of a call, including the wait for a slot."""
    has_side_effects: bool = False
    """Whether it changes anything outside of its episode; only live episodes, which a client requested, call it
    then."""
    is_trusted: bool = True
    """Whether the operator vouches for its results. Text that others write (a web page, an MCP server) is untrusted: no
    cycle learns from an episode that read it until an operator approves the episode."""
    max_output_chars: int = 20_000
    max_concurrency: int | None = None
    """Maximum concurrent calls, of all episodes together; None is unlimited."""
    source: str = "this server"
    """The tool's origin, for messages."""
    call_for: Callable[[str, dict[str, Any]], Awaitable[str]] | None = None
    """Called with (tenant, arguments) instead of `call`, by tools whose data belongs to a tenant."""

    def definition(self) -> dict[str, Any]:
        """Return the tool's definition for the model, in OpenAI's format."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @cached_property
    def validator(self) -> jsonschema.Draft202012Validator:
        # An empty registry: by default jsonschema would fetch a remote $ref from any URL.
        return jsonschema.Draft202012Validator(self.parameters, registry=referencing.Registry())

    @cached_property
    def slots(self) -> asyncio.Semaphore | None:
        """A semaphore over the concurrent calls; None if they are unlimited."""
        # Kept by this object alone: `replace` makes a tool with slots of its own, so replace before the first call.
        return None if self.max_concurrency is None else asyncio.Semaphore(self.max_concurrency)


@dataclass(frozen=True)
class ToolResult:
    """The text for the model, and the error if there was one. `is_invalid`: the call itself was malformed."""

    content: str
    error: str | None = None
    is_invalid: bool = False
    is_trusted: bool = True
    """False if it may contain untrusted text; this includes errors, which may quote the tool's output."""


async def run_tool(tool: Tool, arguments_json: str, *, tenant: str = "") -> ToolResult:
    """Call `tool` with the JSON arguments that a model wrote; return its result or an error text. Never raises."""
    try:
        arguments = parse_arguments(arguments_json)
        # On the event loop and outside of the deadline: a `pattern` in an MCP server's schema may backtrack for long.
        problem = jsonschema.exceptions.best_match(tool.validator.iter_errors(arguments))
    except ValueError as error:
        return invalid_call(str(error))
    except (Unresolvable, RecursionError, re.error) as error:
        return failed_call(f"{tool.name!r} cannot be called: {_describe(error)}")
    if problem is not None:
        message = f"the arguments of {tool.name!r} do not fit its schema: {problem.json_path}: {problem.message}"
        return invalid_call(message)

    deadline = asyncio.get_running_loop().time() + tool.timeout_seconds
    try:
        async with asyncio.timeout_at(deadline):
            if tool.slots is not None:
                await tool.slots.acquire()
    except TimeoutError:
        message = f"TimeoutError: {tool.name!r} is busy: no slot came free in {tool.timeout_seconds:g} seconds"
        return failed_call(message)
    # A task instead of `except Exception`: it separates a tool's exceptions from the cancellation of this coroutine.
    call = tool.call(arguments) if tool.call_for is None else tool.call_for(tenant, arguments)
    running = asyncio.ensure_future(call)
    # No `await` between the acquired slot and this: a cancellation would lose the slot for good.
    running.add_done_callback(lambda ended: _release_slot(tool, ended))
    try:
        await asyncio.wait({running}, timeout=deadline - asyncio.get_running_loop().time())
        result = _to_result(tool, running)
        return replace(result, is_trusted=result.is_trusted and tool.is_trusted)
    finally:
        running.cancel()


def _release_slot(tool: Tool, ended: asyncio.Future[str]) -> None:
    """Release the slot once the call has really ended: a call that hangs still uses the limited resource."""
    if tool.slots is not None:
        tool.slots.release()
    if not ended.cancelled():
        ended.exception()  # marks it as retrieved; otherwise asyncio logs it when nobody waits any more


def _to_result(tool: Tool, running: asyncio.Future[str]) -> ToolResult:
    if not running.done():
        return failed_call(f"TimeoutError: {tool.name!r} gave no result within {tool.timeout_seconds:g} seconds")
    if running.cancelled():
        return failed_call(f"CancelledError: {tool.name!r} gave up")
    if (error := running.exception()) is not None:
        return failed_call(_describe(error))
    result = running.result()
    if not isinstance(result, str):
        return failed_call(f"{tool.name!r} returned {type(result).__name__}, not text")
    return ToolResult(_truncate(result, tool.max_output_chars), is_trusted=not isinstance(result, UntrustedText))


def parse_arguments(arguments_json: str) -> dict[str, Any]:
    """Return the arguments of a call. Raises ValueError when they are not a JSON object."""
    try:
        arguments = json.loads(arguments_json or "{}")
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"the arguments {_shorten(arguments_json)} are not valid JSON") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments {_shorten(arguments_json)} are not a JSON object")
    return arguments


def invalid_call(message: str) -> ToolResult:
    """Return the result of a malformed call."""
    return replace(failed_call(message), is_invalid=True)


def failed_call(message: str) -> ToolResult:
    """Return the result of a valid call that failed."""
    message = _truncate(message, MAX_ERROR_CHARS)
    return ToolResult(f"Error: {message}", error=message)


def _describe(error: BaseException) -> str:
    if isinstance(error, ToolError):
        return str(error)
    # Not str(error): __str__ may be the tool's own code and may raise.
    return "".join(traceback.format_exception_only(error)).strip()


def _truncate(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n[{len(text) - max_chars} more characters were cut]"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
