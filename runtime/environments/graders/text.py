"""Graders of a reply's text: exact, contains, regex, JSON schema."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jsonschema
import jsonschema.exceptions
import regex
from pydantic import Field, JsonValue, field_validator

from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission, quote, right, wrong
from runtime.environments.graders.schema_check import CPU_SECONDS

REGEX_SECONDS = 1.0
"""Maximum duration of one search; some patterns take exponential time."""
# A process: jsonschema's patterns are Python's, which hold the interpreter for as long as they search.
SCHEMA_CHECK = (sys.executable, "-m", "runtime.environments.graders.schema_check")
SCHEMA_CHECK_SECONDS = 60.0
"""Maximum duration of one check on a busy machine; its processor time has a limit of its own."""
ROOT = Path(__file__).parents[3]
_FENCE = re.compile(r"^[ \t]*```[\w+-]*[ \t]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)


Text = Annotated[str, Field(min_length=1)]
Answers = Text | Annotated[list[Text], Field(min_length=1)]
"""One answer or several; never none, which every reply would contain."""


class Exact(Grader):
    """The reply is one of the answers, but for the space around it."""

    type: Literal["exact"]
    answer: Answers
    ignore_case: bool = False

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        text = _fold(submission.text.strip(), self.ignore_case)
        if any(text == _fold(answer.strip(), self.ignore_case) for answer in list_answers(self.answer)):
            return right("the reply is the answer")
        return wrong(f"expected {quote(self.answer)}, not {quote(submission.text)}")


class Contains(Grader):
    """The reply contains one of the answers, or all of them."""

    type: Literal["contains"]
    answer: Answers
    every: bool = False
    """Whether all answers must be there."""
    ignore_case: bool = True

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        text = _fold(submission.text, self.ignore_case)
        answers = list_answers(self.answer)
        missing = [answer for answer in answers if _fold(answer, self.ignore_case) not in text]
        if not missing or (not self.every and len(missing) < len(answers)):
            return right("the reply contains the answer")
        return wrong(f"the reply does not contain {quote(missing if self.every else self.answer)}")


class Regex(Grader):
    """The pattern is found in the reply."""

    type: Literal["regex"]
    pattern: str
    ignore_case: bool = False
    whole: bool = False
    """Whether the pattern must match the whole reply."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        compiled = regex.compile(self.pattern, regex.IGNORECASE if self.ignore_case else 0)
        search = compiled.fullmatch if self.whole else compiled.search
        try:
            # `concurrent` releases the interpreter: a slow pattern must not stop the server.
            found = await asyncio.to_thread(search, submission.text, timeout=REGEX_SECONDS, concurrent=True)
        except TimeoutError:
            return wrong(f"the pattern {quote(self.pattern)} took more than {REGEX_SECONDS:g} s on the reply")
        return right("the pattern matches") if found else wrong(f"the pattern {quote(self.pattern)} does not match")


class JsonSchema(Grader):
    """The reply is JSON that fits a schema; a fenced block in it counts as well."""

    type: Literal["json_schema"]
    json_schema: dict[str, JsonValue] = Field(alias="schema")

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.exceptions.SchemaError as error:
            raise ValueError(f"not a JSON schema: {error.message}") from None
        return schema

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        problem = await _find_problem(self.json_schema, [submission.text, *find_fenced_blocks(submission.text)])
        return right("the reply fits the schema") if problem is None else wrong(problem)


async def _find_problem(schema: dict[str, JsonValue], texts: Sequence[str]) -> str | None:
    """Return why the first text that is JSON does not fit the schema, or None if it does.

    Raises:
        RuntimeError, TimeoutError: the process that finds out died, or gives no answer: no reply may be blamed for it.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*SCHEMA_CHECK, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(SCHEMA_CHECK_SECONDS):
            output, errors = await process.communicate(json.dumps({"schema": schema, "texts": texts}).encode())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
    if process.returncode == -signal.SIGXCPU:
        return f"the schema took more than {CPU_SECONDS} s of processor time on the reply"
    if process.returncode != 0:
        end = errors.decode("utf-8", "replace").strip()[-1_000:]
        raise RuntimeError(f"a check of a JSON schema ended with status {process.returncode}: {end}")
    return json.loads(output)


def find_fenced_blocks(text: str) -> Iterator[str]:
    """Yield the contents of the blocks between lines of three backticks, in order."""
    return (match[1] for match in _FENCE.finditer(text))


def list_answers(answer: str | Sequence[str]) -> Sequence[str]:
    return [answer] if isinstance(answer, str) else answer


def _fold(text: str, ignore_case: bool) -> str:
    return text.casefold() if ignore_case else text
