"""The grader of tasks with a machine: checks by scripts in it, and comparisons, as AgentBench's OS tasks have them.

The checks of a row run one after the other (arXiv 2308.03688). A script is given the answer and what the scripts before
it printed; it fails by its exit status. A comparison compares the answer with what the first script printed.
Invariant: comparisons run here and not in the machine, where the model could have replaced them.
Hazard: scripts read the files that the model worked on, and a model that is trained to deceive them will try to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission, quote, right, wrong
from runtime.environments.machines.machine import Machine, Script
from runtime.errors import ToolError

UNITS = {"Byte": 1, "B": 1, **{unit: 1024**power for power, unit in enumerate("KMGTP", start=1)}}
"""Of sizes. AgentBench's own rule reads no other: neither `4KB` nor `1.5M` equals itself."""


class Compare(BaseModel, extra="forbid"):
    """A comparison of the answer with the output of the first script."""

    compare: Literal["integer", "string", "size", "containing", "in"]


class Run(BaseModel, extra="forbid"):
    """A script in the machine, with the answer and the outputs so far as its arguments."""

    run: Script


class Checks(Grader):
    """All checks pass, in their order."""

    type: Literal["checks"]
    checks: list[Run | Compare] = Field(min_length=1)

    @model_validator(mode="after")
    def _begins_with_a_script(self) -> Checks:
        if isinstance(self.checks[0], Compare):
            raise ValueError("the first check must run a script, whose output a later one can compare")
        return self

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        assert submission.machine is not None, "checked when the row was read"
        try:
            problem = await find_problem(self.checks, submission.text, submission.machine)
        except ToolError as error:  # the model broke its machine: it worked when the task began
            return wrong(str(error))
        return right("all checks pass") if problem is None else wrong(problem)


async def find_problem(checks: list[Run | Compare], answer: str, machine: Machine) -> str | None:
    """Return why an answer fails, None if it does not. Raises: ToolError if the machine has stopped working."""
    values = [answer]
    for number, check in enumerate(checks, start=1):
        if isinstance(check, Compare):
            if not COMPARISONS[check.compare](answer, values[1]):
                return f"expected {quote(values[1].strip())} ({check.compare}), not {quote(answer)}"
            continue
        result = await machine.run_script(check.run, *values)
        if result.status != 0:
            output = (result.stderr or result.stdout)[-200:].strip()
            return f"check {number} ended with status {result.status} for {quote(answer)}: {output}"
        values.append(result.stdout)
    return None


def is_same_integer(answer: str, expected: str) -> bool:
    try:
        return int(answer) == int(expected)
    except ValueError:
        return False


def is_same_string(answer: str, expected: str) -> bool:
    return _strip(answer) == _strip(expected)


def is_same_size(answer: str, expected: str) -> bool:
    try:
        return _read_size(answer) == _read_size(expected)
    except ValueError:
        return False


def contains(answer: str, expected: str) -> bool:
    return _strip(expected) in _strip(answer)


def is_part(answer: str, expected: str) -> bool:
    return _strip(answer) in _strip(expected)


COMPARISONS: Mapping[str, Callable[[str, str], bool]] = {
    "integer": is_same_integer,
    "string": is_same_string,
    "size": is_same_size,
    "containing": contains,
    "in": is_part,
}


def _read_size(text: str) -> int:
    """Return the bytes of a size such as `12K`. Raises: ValueError."""
    text = text.strip()
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    return int(text.removesuffix(unit)) * UNITS.get(unit, 1)


def _strip(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()
