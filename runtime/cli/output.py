"""Runs commands and prints their results or errors, for people or as JSON.

Invariants: with `--json`, standard output contains exactly one JSON object, also after an error. Progress goes to
standard error. No control character of any data reaches the terminal, and no data is interpreted as markup.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console, RenderableType

from runtime.cli.printable import printable, printable_json

FAILED = 1
BAD_USAGE = 2
INTERRUPTED = 130


Renderer = Callable[[dict[str, Any]], RenderableType | str]
"""Makes something readable of a result's JSON. An empty string prints nothing."""


class Failure(Exception):
    """The one-line error of a command; `body` holds further fields for `--json`."""

    def __init__(self, message: str, /, *, exit_code: int = FAILED, **body: object) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.body = body


def progress_console(as_json: bool) -> Console:
    """Return the console for progress messages: standard error, silent with `--json`."""
    # Markup is on here: data has to be escaped, or printed with `markup=False`.
    return Console(stderr=True, quiet=as_json, highlight=False)


def run_command(
    work: Callable[[], Coroutine[Any, Any, dict[str, Any]]], *, as_json: bool, render: Renderer
) -> dict[str, Any]:
    """Run a command's work on a new event loop, print its result and return it.

    Raises:
        Failure: the work failed with an error that the user can understand.
    """
    # A loop for each command: nothing that belongs to a loop may be kept at module level.
    result = asyncio.run(_raising_failures(work()))
    print_result(result, as_json=as_json, render=render)
    return result


def print_result(result: dict[str, Any], *, as_json: bool, render: Renderer) -> None:
    """Print a result as JSON or rendered."""
    if as_json:
        print(printable_json(json.dumps(result, ensure_ascii=False)), flush=True)
    else:
        rendered = render(printable(result))
        if rendered == "":
            return
        # `tasks.jsonl:100:` is a line, not a picture.
        Console(highlight=False, markup=False, emoji=False).print(rendered, soft_wrap=isinstance(rendered, str))


async def _raising_failures(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    from runtime.cli.client import ErrorReply, ServerUnreachable

    try:
        return await work
    except ErrorReply as error:
        raise Failure(str(error), **error.body) from None
    except ServerUnreachable as error:
        raise Failure(str(error), code="no_server") from None
    except ValueError as error:
        raise Failure(str(error), exit_code=BAD_USAGE) from None


def run(app: typer.Typer, arguments: list[str]) -> int:
    """Run the command line and return its exit code; an error is printed as one line or one JSON object."""
    # Read from the raw arguments: a usage error has to be JSON too, and is raised before typer parses the option.
    as_json = "--json" in arguments
    try:
        code = app(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Failure as failure:
        return _print_error(str(failure), failure.exit_code, as_json, failure.body)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 0
        return _print_error(error.format_message(), BAD_USAGE, as_json, {})
    except (KeyboardInterrupt, typer.Abort):
        return _print_error("interrupted", INTERRUPTED, as_json, {})


def exit_process(exit_code: int) -> NoReturn:
    """End the process with this exit code, even while daemon threads run.

    Python's own exit unwinds daemon threads; one that is inside C++ code of a library (torch takes seconds to load)
    would abort the process with signal 6 instead of the exit code.
    """
    if any(thread.daemon and thread is not threading.current_thread() for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)  # skips atexit handlers and buffers, which are flushed above
    sys.exit(exit_code)


def _print_error(message: str, exit_code: int, as_json: bool, body: Mapping[str, object]) -> int:
    if as_json:
        print(printable_json(json.dumps({"error": {**body, "message": message}}, ensure_ascii=False)), flush=True)
    else:
        console = Console(file=sys.stderr, highlight=False, soft_wrap=True, emoji=False)
        console.print(f"error: {printable(message)}", style="red", markup=False)
    return exit_code
