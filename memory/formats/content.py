"""The one form that every format is read into and written from: a prompt, the replies to it, and what they are worth.

Invariant: only assistant messages of `completion` (and of `rejected`) are trained; a prompt never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = dict[str, Any]
"""In OpenAI's form. `weight: 0` on an assistant message keeps it out of the loss."""
Row = dict[str, Any]
"""One row of a file, parsed from JSON."""


class ExampleKind(StrEnum):
    """The kinds of examples, by what is learned from them."""

    DEMONSTRATION = "demonstration"  # a completion to imitate
    PREFERENCE = "preference"  # two completions of one prompt, of which one is better
    LABEL = "label"  # a completion that is good or bad, without another to compare it with


class BadRow(ValueError):
    """A row is not what its format says; the message names what is wrong, and the mend."""


class NotExpressible(ValueError):
    """A format has no way to say what an example says; the message is the reason."""


@dataclass(frozen=True)
class ExampleContent:
    """One example."""

    kind: ExampleKind
    completion: list[Message]
    """To imitate, the better one, or the labelled one. A demonstration that is one conversation is all in here."""
    prompt: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    """The worse completion of a preference."""
    is_good: bool | None = None
    """Of a label."""
    reward: float | None = None
    """From 0 to 1, where the file says how well a demonstration did."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Tool definitions in OpenAI's form."""
    task: str | None = None
    """The name of the task, where the file has one."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The fields of the row that no other attribute holds; written back in the same format only."""

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, with weight 0 on the replies of the prompt."""
        return [*map(without_loss, self.prompt), *self.completion]


def without_loss(message: Message) -> Message:
    """Return a message that is not trained: an assistant's with weight 0, any other unchanged."""
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def is_trained(message: Message) -> bool:
    """Return whether a message of a completion has a loss."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0
