"""The errors of learning.

OptimizerError
|-- TooFewTrajectories   a cycle has less to learn from than it needs; carries the number missing (a ValueError)
|-- TemplateMismatch     the chat template keeps too many of the agent's own tokens from being trained
|-- CannotReplay         a method would branch episodes of an environment that cannot be replayed (a ValueError)
|-- TrainingDoesNotFit   no GPU has the memory for it; names the settings with which one would (a ValueError)
`-- TrainingError        a trainer died; carries the tail of its log


CompletionError          a model gave no answer; costs one critique, never the cycle
`-- PromptTooLong        the messages exceed the model's context: shorter ones may succeed
"""

from __future__ import annotations


class OptimizerError(Exception):
    """A cycle cannot continue; the message names the cause and the mend."""


class TooFewTrajectories(OptimizerError, ValueError):
    """There is not enough to learn from."""

    def __init__(self, message: str, *, num_missing: int) -> None:
        super().__init__(message)
        self.num_missing = num_missing


class TemplateMismatch(OptimizerError):
    """Too few of the agent's own tokens can be trained: prompts do not render as the engine saw them."""


class TrainingError(OptimizerError):
    """A trainer ended without an adapter."""


class CannotReplay(OptimizerError, ValueError):
    """The episodes of an environment cannot be replayed; nothing was played."""


class CompletionError(Exception):
    """A model called through the `Complete` seam gave no answer; the message gives the cause."""


class PromptTooLong(CompletionError):
    """The messages and the answer exceed the model's context."""


class TrainingDoesNotFit(OptimizerError, ValueError):
    """The chosen GPU has too little memory, by arithmetic; nothing was started."""
