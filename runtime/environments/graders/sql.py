"""Graders of tasks with a database: its state after the episode, and the values that were found in it.

Values, and a state that is given by its digest, compare as AgentBench's database tasks do (arXiv 2308.03688).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from pydantic import model_validator

from runtime.engine.client import ToolDefinition
from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission, quote, right, wrong
from runtime.environments.graders.text import Answers, list_answers
from runtime.errors import ToolError

TOLERANCE = 1e-2
_NOTHING = frozenset({"none", "null", "undefined", "nan", "inf", "infinity", "-inf", "-infinity", ""})


class DatabaseState(Grader):
    """After the episode the tables hold what they should."""

    type: Literal["database_state"]
    statement: str | None = None
    """A statement that makes the tables as they should be, from those of the row."""
    digest: str | None = None
    """Or `SqlDatabase.digest` of the tables as they should be, as AgentBench publishes it."""

    @model_validator(mode="after")
    def _has_one(self) -> DatabaseState:
        if (self.statement is None) == (self.digest is None):
            raise ValueError("give either a statement or a digest")
        return self

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        assert submission.database is not None, "checked when the row was read"
        if self.statement is None:
            is_right = await submission.database.digest() == self.digest
        else:
            expected = await submission.database.contents_after(self.statement)
            try:
                is_right = await submission.database.contents() == expected
            except ToolError as error:  # a policy can make tables that cannot be read
                return wrong(str(error))
        if is_right:
            return right("the tables hold what they should")
        return wrong("the tables do not hold what they should")

    def check(self, tools: Sequence[ToolDefinition], resources: GradingResources, *, has_database: bool) -> None:
        if not has_database:
            raise ValueError("the grader 'database_state' needs a database: give the row one")


class Values(Grader):
    """The submitted values are the expected ones, in any order; numbers are equal within 0.01."""

    type: Literal["values"]
    answer: Answers

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        given = [normalize_value(value) for value in read_values(submission.text)]
        expected = [normalize_value(value) for value in list_answers(self.answer)]
        if have_equal_values(given, expected):
            return right("the values are the expected ones")
        return wrong(f"expected {quote(self.answer)}, not {quote(submission.text)}")


def read_values(text: str) -> list[str]:
    """Return the values of a JSON list, or the text itself as the only one."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return [str(value) for value in values] if isinstance(values, list) else [text]


def normalize_value(value: str) -> str:
    """Return a value without quotation marks, percent sign and thousands separators; "0" where it says nothing."""
    value = value.strip().strip("'\"")
    if value.endswith("%"):
        return value[:-1].strip()
    value = value.replace(",", "")
    return "0" if value.lower() in _NOTHING else value


def have_equal_values(given: Sequence[str], expected: Sequence[str]) -> bool:
    """Return whether both hold the same values; the texts of several are compared as sets, as AgentBench does."""
    numbers, expected_numbers = _as_numbers(given), _as_numbers(expected)
    if numbers is None or expected_numbers is None:
        return set(given) == set(expected)
    if len(numbers) != len(expected_numbers):
        return False
    left = list(expected_numbers)
    for number in numbers:
        match = next((each for each in left if abs(number - each) <= TOLERANCE), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _as_numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except ValueError:
        return None
