"""Graders of a reply's text: exact, contains, regex, JSON schema."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import jsonschema
import jsonschema.exceptions
import referencing
import regex
from pydantic import Field, JsonValue, field_validator
from referencing.exceptions import Unresolvable

from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission, quote, right, wrong

REGEX_SECONDS = 1.0
"""Maximum duration of one search; some patterns take exponential time."""
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
        value = read_json(submission.text)
        if value is NOT_JSON:
            return wrong(f"the reply is not JSON: {quote(submission.text)}")
        # An empty registry: by default jsonschema would fetch a remote $ref from any URL.
        validator = jsonschema.Draft202012Validator(self.json_schema, registry=referencing.Registry())
        try:
            problem = jsonschema.exceptions.best_match(validator.iter_errors(value))
        except (Unresolvable, RecursionError) as error:
            return wrong(f"the schema cannot be applied: {error}")
        if problem is None:
            return right("the reply fits the schema")
        return wrong(f"{problem.json_path}: {problem.message}"[:1_000])


NOT_JSON = object()


def read_json(text: str) -> Any:
    """Return the JSON value that a text is, or that its first readable fenced block is; else `NOT_JSON`."""
    for candidate in (text, *find_fenced_blocks(text)):
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    return NOT_JSON


def find_fenced_blocks(text: str) -> Iterator[str]:
    """Yield the contents of the blocks between lines of three backticks, in order."""
    return (match[1] for match in _FENCE.finditer(text))


def list_answers(answer: str | Sequence[str]) -> Sequence[str]:
    return [answer] if isinstance(answer, str) else answer


def _fold(text: str, ignore_case: bool) -> str:
    return text.casefold() if ignore_case else text
