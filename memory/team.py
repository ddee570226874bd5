"""The roles of a team of agents, and which steps each of them wrote and reads.

A team's steps lie in one trajectory. The actor's conversation with its tools and its client is what the trajectory of a
single agent would be; the plan and the checks lie between its steps.

Hazard: prompts and training rows depend on the texts that are made here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from memory.chat_marks import neutralise


class Role(StrEnum):
    """The role in which a policy made a call."""

    PLANNER = "planner"  # writes a plan, once
    ACTOR = "actor"  # uses the tools and answers
    CHECKER = "checker"  # reads an answer, and accepts it or sends it back with a note


class HasRole(Protocol):
    """A step, or a row of these columns."""

    @property
    def kind(self) -> str: ...

    @property
    def role(self) -> Role | None: ...


StepT = TypeVar("StepT", bound=HasRole)


def is_actors(step: HasRole) -> bool:
    """Whether a step is of the actor's conversation: not the plan, and not a check. A note to the actor is."""
    return step.role not in (Role.PLANNER, Role.CHECKER) or step.kind == "user"


def is_note(step: HasRole) -> bool:
    """Whether a step is a note with which the checker sent an answer back."""
    return step.kind == "user" and step.role is Role.CHECKER


def read_by_client(steps: Sequence[StepT]) -> list[StepT]:
    """Return the steps without the plan, the checks, the notes and the answers that were sent back."""
    kept: list[StepT] = []
    for step in steps:
        if is_note(step):
            kept.pop()  # the answer: nothing of the actor's lies between it and its note
        elif is_actors(step):
            kept.append(step)
    return kept


def find_plan(steps: Sequence[Any]) -> str:
    """Return the plan among the steps; empty without one."""
    return next((step.content for step in steps if step.role is Role.PLANNER), "")


def write_note(note: str) -> str:
    """Return the user's message that brings a note to the actor."""
    return f"Your answer was checked and sent back:\n{neutralise(note)}\n\nGive the whole answer again."


@dataclass(frozen=True)
class Check:
    """The checker's decision about an answer."""

    accepts: bool
    note: str = ""
    """The fault of the answer; empty if it is accepted."""


_DECISION = re.compile(r"^\W{0,8}(accept|revise)(?:ed|d)?\b[\s:.,*_-]*", re.IGNORECASE | re.MULTILINE)


def read_check(text: str) -> Check | None:
    """Return the decision of a checker's reply: its first line that begins with ACCEPT, or with REVISE and a note
    behind it. None if there is none, or no note."""
    decision = _DECISION.search(text)
    if decision is None:
        return None
    if decision[1].lower() == "accept":
        return Check(True)
    note = text[decision.end() :].strip()
    return Check(False, note) if note else None
