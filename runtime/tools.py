"""What the agent can do besides talk: a tool has a name, a schema for its arguments, and something to call.

Refuses to know which episode a call belongs to, and what becomes of its result.
Flow of a call: parse the arguments -> check them against the schema -> call, within a deadline -> cut what is too long.
Invariant: `run_tool` returns. A tool that raises, hangs or is called wrongly yields text that tells the model so.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_type_hints

import jsonschema
from pydantic import BaseModel, create_model
from pydantic import Field as ModelField

from runtime.errors import ToolError

DEFAULT_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Tool:
    """One thing the agent can do. `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    call: Callable[[dict[str, Any]], Awaitable[str]]
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    has_side_effects: bool = False
    max_output_chars: int = 20_000

    def definition(self) -> dict[str, Any]:
        """Return the tool as the model is told of it, in OpenAI's form."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @cached_property
    def validator(self) -> jsonschema.Draft202012Validator:
        return jsonschema.Draft202012Validator(self.parameters)


@dataclass(frozen=True)
class ToolResult:
    """What the model reads, and what went wrong, if anything. `is_invalid`: the call itself was malformed."""

    content: str
    error: str | None = None
    is_invalid: bool = False


def tool_from_function(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    has_side_effects: bool = False,
) -> Tool:
    """Return a tool that calls `function`: its type hints become the schema, its docstring the description.

    A blocking function runs in a thread of its own. A result that isn't a string is shown as JSON.

    Raises:
        ValueError: a parameter without a type hint, or one that cannot be named in JSON (*args, **kwargs).
    """
    name = name or function.__name__
    arguments_model = _model_arguments(function, name)
    description, _ = _split_docstring(inspect.getdoc(function) or "")

    async def call(arguments: dict[str, Any]) -> str:
        checked = arguments_model.model_validate(arguments)
        values = {field: getattr(checked, field) for field in arguments_model.model_fields}
        if inspect.iscoroutinefunction(function):
            result = await function(**values)
        else:
            result = await _call_in_thread(function, values)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)

    schema = arguments_model.model_json_schema()
    return Tool(name, description, _without_titles(schema), call, timeout_seconds, has_side_effects)


async def run_tool(tool: Tool, arguments_json: str) -> ToolResult:
    """Call `tool` with arguments as the model wrote them; return its result, or what was wrong in words."""
    try:
        arguments = parse_arguments(arguments_json)
    except ValueError as error:
        return invalid(str(error))
    problem = jsonschema.exceptions.best_match(tool.validator.iter_errors(arguments))
    if problem is not None:
        return invalid(f"the arguments of {tool.name!r} do not fit its schema: {problem.json_path}: {problem.message}")

    # A task, not `except Exception`: whatever a tool raises is data here, and our own cancellation is not.
    task = asyncio.ensure_future(tool.call(arguments))
    try:
        await asyncio.wait({task}, timeout=tool.timeout_seconds)
        if not task.done():
            return failed(f"TimeoutError: {tool.name!r} gave no result within {tool.timeout_seconds:g} seconds")
        if task.cancelled():
            return failed(f"CancelledError: {tool.name!r} gave up")
        if (error := task.exception()) is not None:
            return failed(str(error) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}")
        return ToolResult(_cut(str(task.result()), tool.max_output_chars))
    finally:
        task.cancel()


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
    return ToolResult(f"Error: {message}", error=message, is_invalid=True)


def failed(message: str) -> ToolResult:
    """Return the result of a sound call that went wrong."""
    return ToolResult(f"Error: {_cut(message, 2_000)}", error=message)


async def _call_in_thread(function: Callable[..., Any], values: dict[str, Any]) -> Any:
    """Call a blocking function in a daemon thread of its own.

    Not in a pool: tools that hang would fill it, and everything else that blocks would wait behind them.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = context.run(function, **values)
        except StopIteration:  # a future refuses to carry it
            error = RuntimeError("the tool raised StopIteration")
        except BaseException as raised:  # delivered, not swallowed
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=work, name=f"tool-{function.__name__}", daemon=True).start()
    return await future


def _model_arguments(function: Callable[..., Any], name: str) -> type[BaseModel]:
    hints = get_type_hints(function, include_extras=True)
    _, notes = _split_docstring(inspect.getdoc(function) or "")
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(f"tool {name!r}: parameter {parameter.name!r} has no name in JSON: make it a plain one")
        if parameter.name not in hints:
            raise ValueError(f"tool {name!r}: parameter {parameter.name!r} has no type hint: add one")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (
            hints[parameter.name],
            ModelField(default=default, description=notes.get(parameter.name)),
        )
    return create_model(name, __config__={"extra": "forbid"}, **fields)


def _split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description, and the notes of an `Args:` section by parameter."""
    description, _, rest = text.partition("\nArgs:\n")
    notes: dict[str, str] = {}
    current = None
    for line in rest.splitlines():
        if not line.strip():
            continue
        if not line.startswith(" "):
            break  # the next section
        head, colon, note = line.strip().partition(":")
        if colon and head.split(" ")[0].isidentifier() and not line.startswith("     "):
            current = head.split(" ")[0]
            notes[current] = note.strip()
        elif current is not None:
            notes[current] += f" {line.strip()}"
    return description.strip(), notes


def _without_titles(schema: Any) -> Any:
    """Drop the titles pydantic adds: they repeat the names, and the model pays for them in every prompt."""
    if isinstance(schema, list):
        return [_without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _without_titles(part) for name, part in value.items()}
        if key in ("properties", "$defs")
        else _without_titles(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n[{len(text) - max_chars} more characters were cut]"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
