"""How a verb ends: with something to read, or with one JSON object and nothing else, also when it fails.

Refuses to know what verbs do.
Invariants: with `--json`, standard output holds exactly one JSON object; what moves on the screen goes to
standard error, and only where somebody is there to watch. No control character of any data reaches the terminal, and
no text of it is read as markup.
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


class Failure(Exception):
    """A verb that cannot go on, in one line; `body` is what `--json` prints beyond the message."""

    def __init__(self, message: str, /, *, exit_code: int = FAILED, **body: Any) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.body = body


def watching(as_json: bool) -> Console:
    """Return the console for progress: standard error, silent with `--json`."""
    return Console(stderr=True, quiet=as_json, highlight=False)


def perform(
    work: Callable[[], Coroutine[Any, Any, dict[str, Any]]],
    *,
    as_json: bool,
    show: Callable[[dict[str, Any]], RenderableType | str],
) -> dict[str, Any]:
    """Do a verb's work and say what came of it.

    Raises:
        Failure: the work could not be done, in words.
    """
    result = asyncio.run(_in_words(work()))
    say(result, as_json=as_json, show=show)
    return result


def say(result: Mapping[str, Any], *, as_json: bool, show: Callable[[Any], RenderableType | str]) -> None:
    """Print a result, as JSON or to be read."""
    if as_json:
        print(printable_json(json.dumps(result, ensure_ascii=False)), flush=True)
    else:
        shown = show(printable(result))
        if shown == "":
            return
        Console(highlight=False, markup=False).print(shown, soft_wrap=isinstance(shown, str))


async def _in_words(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    from runtime.cli.client import NoServer, Refused
    from runtime.cli.learn import CycleFailed

    try:
        return await work
    except Refused as refused:
        raise Failure(str(refused), **refused.body) from None
    except CycleFailed as failed:
        raise Failure(str(failed), cycle=failed.cycle["id"], stage=failed.cycle["stage"]) from None
    except NoServer as nobody:
        raise Failure(str(nobody), code="no_server") from None
    except ValueError as bad:
        raise Failure(str(bad), exit_code=BAD_USAGE) from None


def run(app: typer.Typer, arguments: list[str]) -> int:
    """Run the command line and return its exit code; every failure is one line, or one JSON object."""
    as_json = "--json" in arguments
    try:
        code = app(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Failure as failure:
        return _fail(str(failure), failure.exit_code, as_json, failure.body)
    except typer.TyperException as misuse:
        if type(misuse).__name__ == "NoArgsIsHelpError":
            print(misuse.format_message())
            return 0
        return _fail(misuse.format_message(), BAD_USAGE, as_json, {})
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED, as_json, {})


def leave(exit_code: int) -> NoReturn:
    """End the process with this exit code, whatever its threads are doing.

    A daemon thread that is still inside a library's C++ code (torch takes seconds to load) would be unwound through it
    by Python's own exit, and the process would abort with signal 6 in place of its exit code.
    """
    if any(thread.daemon and thread is not threading.current_thread() for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _fail(message: str, exit_code: int, as_json: bool, body: Mapping[str, Any]) -> int:
    if as_json:
        print(printable_json(json.dumps({"error": {**body, "message": message}}, ensure_ascii=False)), flush=True)
    else:
        console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        console.print(f"error: {printable(message)}", style="red", markup=False)
    return exit_code
