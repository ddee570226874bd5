"""Graders that run code: unit tests on the code of a reply, in the sandbox, and a function of the operator's.

Invariants: text of a task file or of a reply runs in the sandbox only; a function is named by the operator's
configuration, never by a task file, which is data.
Hazard: a reply's code runs in the same process as its tests, so code that is written against the grader can pass. The
proof of a pass is a nonce that only this process knows, and the code has to search its own process for it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Sequence
from typing import Any, Literal, cast

from pydantic import JsonValue

from runtime.engine.client import ToolDefinition
from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission, quote, right, wrong
from runtime.environments.graders.text import find_fenced_blocks
from runtime.errors import ToolError, ToolRefused
from runtime.tools.sandbox import SandboxLimits, describe_refusal, find_bwrap, run_in_sandbox, sandboxed_python

RUN_SECONDS = 15.0
FUNCTION_SECONDS = 60.0
MAX_RUNS = 2
"""Concurrent runs of tests, of all episodes together."""


class UnitTests(Grader):
    """The code of the reply passes the tests: `prompt`, the code and `tests` make a program that ends without an
    error."""

    type: Literal["unit_tests"]
    tests: str
    prompt: str = ""
    """Code that the reply continues or repeats, such as imports and a signature."""
    entry_point: str = ""
    """The function under test. A reply that defines it stands behind the imports of `prompt`, one that does not stands
    behind all of `prompt`."""

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        code = find_code(submission.text, self.entry_point)
        nonce = secrets.token_hex(16)
        program = "\n".join([complete_code(code, self.prompt, self.entry_point), self.tests, f"print({nonce!r})"])
        problem = await run_program(program, nonce)
        return right("the tests pass") if problem is None else wrong(problem)

    def check(self, tools: Sequence[ToolDefinition], resources: GradingResources, *, has_database: bool) -> None:
        try:
            sandboxed_python(find_bwrap(), SandboxLimits())
        except ToolRefused as refused:
            raise ValueError(describe_refusal(refused, "the grader 'unit_tests'")) from None


def find_code(text: str, entry_point: str) -> str:
    """Return the fenced block that defines `entry_point`, else the first one, else the text."""
    blocks = list(find_fenced_blocks(text))
    if not blocks:
        return text
    return next((block for block in blocks if defines(block, entry_point)), blocks[0])


def complete_code(code: str, prompt: str, entry_point: str) -> str:
    """Return the whole program of a reply."""
    if not prompt:
        return code
    if not defines(code, entry_point):
        return f"{prompt}{code}"
    # Helpers of the prompt stay: tests may call them. The prompt's own signature of the entry point has no body.
    head = re.split(rf"^(?:async )?def {re.escape(entry_point)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{head}\n{code}"


def defines(code: str, entry_point: str) -> bool:
    """Return whether the code defines the function at its top level; without a name, whether it defines any."""
    name = re.escape(entry_point) if entry_point else r"\w+"
    return re.search(rf"^(?:async )?def {name}\b", code, re.MULTILINE) is not None


class _Sandbox:
    """The sandbox of all tests: checked once, used by a few at a time."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(MAX_RUNS)
        self.command = sandboxed_python(find_bwrap(), SandboxLimits())
        self._is_checked = False

    async def require_working(self) -> None:
        """Run a small program. Raises: ToolRefused if it fails: then no reply may be blamed for it."""
        if self._is_checked:
            return
        try:
            output = (await run_in_sandbox(self.command, "print(6 * 7)")).strip()
        except ToolError as error:
            output = str(error)
        if output != "42":
            raise ToolRefused(
                f"the grader 'unit_tests' cannot run here, bubblewrap says {output!r}: it needs version 0.8 and user "
                "namespaces for this user (on Ubuntu, an AppArmor profile for bwrap)"
            )
        self._is_checked = True


_sandboxes: dict[asyncio.AbstractEventLoop, _Sandbox] = {}


async def run_program(program: str, nonce: str) -> str | None:
    """Run a program in the sandbox; return why it did not print `nonce` last, or None if it did.

    Raises:
        ToolRefused: the sandbox itself does not work.
    """
    loop = asyncio.get_running_loop()
    # A semaphore belongs to one event loop; tests run several after another.
    for closed in [known for known in _sandboxes if known.is_closed()]:
        del _sandboxes[closed]
    if loop not in _sandboxes:
        _sandboxes[loop] = _Sandbox()
    sandbox = _sandboxes[loop]
    async with sandbox.slots:
        await sandbox.require_working()
        try:
            async with asyncio.timeout(RUN_SECONDS):
                output = await run_in_sandbox(sandbox.command, program)
        except ToolError as error:
            return str(error)[-1_000:]
        except TimeoutError:
            return f"the tests did not end within {RUN_SECONDS:g} seconds"
    return None if output.rstrip().endswith(nonce) else "the program ended before its tests did"


class Function(Grader):
    """A Python function of the operator's decides: `function(text, answer)`, named in the configuration."""

    type: Literal["function"]
    name: str
    """Its name in `[environments.NAME.functions]`."""
    answer: JsonValue = None

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        function = resources.functions[self.name]
        # In a thread: a function that blocks must not stop the server. One that hangs keeps its thread.
        async with asyncio.timeout(FUNCTION_SECONDS):
            result = await asyncio.to_thread(function, submission.text, self.answer)
        value, reason = cast(tuple[Any, Any], result) if isinstance(result, tuple) else (result, "")
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise ValueError(f"the function {self.name!r} returned {quote(result)}, not a number from 0 to 1 or a bool")
        return Outcome(float(value), str(reason) or f"the function {self.name!r} gave {float(value):g}")

    def check(self, tools: Sequence[ToolDefinition], resources: GradingResources, *, has_database: bool) -> None:
        if self.name not in resources.functions:
            known = ", ".join(map(repr, resources.functions)) or "none"
            raise ValueError(
                f"the function {self.name!r} is not configured (there is: {known}): name it in the environment's "
                f'functions, {self.name} = "package.module:function"'
            )
