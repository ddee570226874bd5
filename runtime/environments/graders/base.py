"""The interface of graders: a `Submission` is what a policy did about a task, a `Grader` turns it into an `Outcome`.

A grader is a row's own data, validated when its file is read, so a mistake in it is found before anything is played.
Invariant: a grader raises only where the world is broken (no sandbox, no critic); a wrong or unreadable reply is an
outcome of 0 with a reason.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel

from runtime.engine.client import Message, ToolCall, ToolDefinition
from runtime.environments.base import Outcome
from runtime.tools.base import parse_arguments

if TYPE_CHECKING:
    from runtime.environments.machines.machine import Machine
    from runtime.environments.sql_database import SqlDatabase

QUOTED_CHARS = 200
_REASONING = re.compile(r"\A.*</think>", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A tool call of a reply. `arguments` is None where they are not a JSON object."""

    name: str
    arguments: dict[str, Any] | None


@dataclass(frozen=True)
class Submission:
    """The end of an episode: the last reply's text and calls, the task's tools, and its database or machine if it has
    one."""

    text: str
    calls: Sequence[Call] = ()
    tools: Sequence[ToolDefinition] = ()
    database: SqlDatabase | None = None
    machine: Machine | None = None
    task: str = ""
    """The task's name."""
    messages: Sequence[Message] = ()
    """The messages that the task opens with."""


class Complete(Protocol):
    async def __call__(self, messages: list[dict[str, Any]], *, schema: dict[str, Any], max_tokens: int) -> str:
        """Answer `messages` with a model, in JSON of `schema` where the engine can hold it to that."""
        ...


class Critic(Protocol):
    async def score(self, question: dict[str, Any]) -> Outcome:
        """Return the outcome of an answer. Raises CriticFailed where there is none."""
        ...


GradingFunction = Callable[[str, Any], object]
"""(text of the reply, `answer` of the row) -> a number in [0, 1], a bool, or a pair of one and a reason."""


@dataclass(frozen=True)
class GradingResources:
    """The resources that the configuration gives to the graders of one environment; a task file only names them."""

    functions: Mapping[str, GradingFunction] = field(default_factory=dict)
    complete: Complete | None = None
    """None: the base model is no critic."""
    critics: Mapping[str, Critic] = field(default_factory=dict)
    """Critics behind URLs, by name."""


class Grader(BaseModel, ABC, extra="forbid"):
    """The rule of one task; its fields are the row's `grader` object."""

    @abstractmethod
    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        """Return the reward of a submission."""

    def check(self, tools: Sequence[ToolDefinition], resources: GradingResources, *, has_database: bool) -> None:
        """Raise ValueError if the task cannot be graded here; called when the file is read."""
        return

    @property
    def needs_critic(self) -> bool:
        """Whether a critic is asked."""
        return False


def read_submission(
    text: str, calls: Sequence[ToolCall], tools: Sequence[ToolDefinition], database: SqlDatabase | None = None
) -> Submission:
    """Return the submission that a reply makes; reasoning before `</think>` is no part of it."""
    return Submission(_REASONING.sub("", text).strip(), [_read_call(call) for call in calls], tools, database)


def _read_call(call: ToolCall) -> Call:
    name = call["function"]["name"]
    try:
        return Call(name, parse_arguments(call["function"]["arguments"]))
    except ValueError:
        return Call(name, None)


def right(reason: str) -> Outcome:
    return Outcome(1.0, reason)


def wrong(reason: str) -> Outcome:
    return Outcome(0.0, reason)


def quote(value: object) -> str:
    """Return `value` for a reason: short, and with its quotation marks."""
    text = repr(value)
    return text if len(text) <= QUOTED_CHARS else f"{text[:QUOTED_CHARS]}..."
