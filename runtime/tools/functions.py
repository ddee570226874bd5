"""Makes tools from Python functions: type hints become the schema, the docstring becomes the description.

A blocking function runs in a thread of its own, so that nothing else waits for it.
Hazard: an asynchronous function runs on the event loop; if it blocks, it blocks the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import inspect
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from types import ModuleType
from typing import Any, cast, get_type_hints

from pydantic import BaseModel, create_model
from pydantic import Field as ModelField
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError, to_json

from runtime.errors import ToolError, ToolRefused
from runtime.tools.base import DEFAULT_TIMEOUT_SECONDS, Tool


def tool_from_function(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    has_side_effects: bool = False,
    max_concurrency: int | None = None,
    source: str = "this server",
) -> Tool:
    """Return a tool that calls `function`. A result that isn't a string is converted to JSON.

    Raises:
        ValueError: a parameter has no type hint, has one without a JSON schema, or cannot be passed by name.
    """
    name = name or function.__name__
    try:
        arguments_model = _model_arguments(function, name)
        schema = cast(dict[str, Any], _without_titles(arguments_model.model_json_schema()))
    except (NameError, PydanticUserError) as error:
        raise ValueError(f"tool {name!r}: its type hints make no JSON schema: {error}") from error
    description, _ = _split_docstring(inspect.getdoc(function) or "")
    fields = arguments_model.model_fields.items()

    def convert(arguments: dict[str, Any]) -> dict[str, Any]:
        """Return keyword arguments of the types that the function declares."""
        validated = arguments_model.model_validate(arguments)
        return {field.alias or attribute: getattr(validated, attribute) for attribute, field in fields}

    def call(arguments: dict[str, Any]) -> Awaitable[str]:
        if inspect.iscoroutinefunction(function):
            return _call_on_event_loop(function, lambda: convert(arguments))
        return _call_in_thread(function, lambda: convert(arguments))

    return Tool(
        name,
        description,
        schema,
        call,
        timeout_seconds,
        has_side_effects,
        max_concurrency=max_concurrency,
        source=source,
    )


def functions_at(path: str) -> list[Callable[..., Any]]:
    """Return the function at `package.module:function`, or all public functions of `package.module`.

    Raises:
        ToolRefused: the module or function does not exist, or the module has no public function.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ToolRefused(
            f"the tool {path!r} cannot be imported: {error}; name it package.module:function, "
            "and set PYTHONPATH to the directory that its package lies in"
        ) from error
    if not name:
        return _public_functions(module)
    function = getattr(module, name, None)
    if not inspect.isroutine(function):
        known = ", ".join(repr(it.__name__) for it in _public_functions(module))
        raise ToolRefused(f"the module {module_name!r} has no function {name!r}; it has: {known}")
    return [function]


def result_as_text(result: object) -> str:
    """Return a function's result as text. Raises ToolError if it has no text form."""
    if isinstance(result, str):
        return result
    if isinstance(result, bytes | bytearray | memoryview):
        raise ToolError(f"the result is {len(result)} bytes, not text")
    try:
        return to_json(result, serialize_unknown=True, inf_nan_mode="constants").decode()
    except (PydanticSerializationError, ValueError) as error:
        raise ToolError(f"the result, a {type(result).__name__}, cannot be shown as JSON: {error}") from error


class _UncancellableFuture(asyncio.Future[str]):
    """The result of a thread. It ignores cancellation, because a thread cannot be cancelled."""

    def cancel(self, msg: object = None) -> bool:
        return False


def _call_in_thread(function: Callable[..., Any], convert: Callable[[], dict[str, Any]]) -> _UncancellableFuture:
    """Call a blocking function in a daemon thread of its own."""
    loop = asyncio.get_running_loop()
    future = _UncancellableFuture(loop=loop)
    # A thread begins with an empty context: logs of the tool would lose the trajectory's id.
    context = contextvars.copy_context()

    def work() -> None:
        try:
            result = result_as_text(context.run(lambda: function(**convert())))
        except StopIteration:  # `set_exception` rejects it
            settle = partial(future.set_exception, RuntimeError("the tool raised StopIteration"))
        except BaseException as error:  # also SystemExit: it is handed to the loop, not swallowed
            settle = partial(future.set_exception, error)
        else:
            settle = partial(future.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle)

    try:
        # Not in a pool: tools that hang would fill it, and everything else that blocks would wait behind them.
        threading.Thread(target=work, name=f"tool-{function.__name__}", daemon=True).start()
    except RuntimeError as error:
        future.set_exception(ToolError(f"the tool could not run: {error}"))
    return future


async def _call_on_event_loop(function: Callable[..., Awaitable[Any]], convert: Callable[[], dict[str, Any]]) -> str:
    try:
        return result_as_text(await function(**convert()))
    except (SystemExit, KeyboardInterrupt) as error:  # raised from a task, these would end the server
        raise ToolError(f"the tool raised {type(error).__name__}") from error


def _public_functions(module: ModuleType) -> list[Callable[..., Any]]:
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    functions = [getattr(module, name) for name in names]
    own = [it for it in functions if inspect.isfunction(it) and it.__module__ == module.__name__]
    if not own:
        raise ToolRefused(f"the module {module.__name__!r} has no public function of its own: name one that has")
    return own


def _model_arguments(function: Callable[..., Any], name: str) -> type[BaseModel]:
    """Return a pydantic model of the arguments."""
    # Raises NameError for a type that is imported under TYPE_CHECKING only.
    hints = get_type_hints(function, include_extras=True)
    _, notes = _split_docstring(inspect.getdoc(function) or "")
    fields: dict[str, Any] = {}
    for position, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(f"tool {name!r}: parameter {parameter.name!r} has no name in JSON: make it a plain one")
        if parameter.name not in hints:
            raise ValueError(f"tool {name!r}: parameter {parameter.name!r} has no type hint: add one")
        default = ... if parameter.default is parameter.empty else parameter.default
        field = ModelField(default=default, description=notes.get(parameter.name), alias=parameter.name)
        # The parameter is the field's alias: pydantic rejects names such as `json` or `_x` for fields.
        fields[f"argument_{position}"] = (hints[parameter.name], field)
    return create_model(name, __config__={"extra": "forbid"}, **fields)


def _split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description, and the descriptions in the `Args:` section by parameter."""
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


def _without_titles(schema: object) -> object:
    """Remove the titles that pydantic adds: they repeat the names and cost tokens in every prompt."""
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
