"""What can go wrong while learning.

OptimizerError
|-- TooFewTrajectories   a cycle was asked to learn from less than it needs; says how many are missing (a ValueError)
|-- TrainingDoesNotFit   no GPU has the memory for it; names the settings with which one would (a ValueError)
`-- TrainingError        a trainer died; carries the tail of its log
"""

from __future__ import annotations


class OptimizerError(Exception):
    """A cycle cannot go on; the message names what is wrong and the mend."""


class TooFewTrajectories(OptimizerError, ValueError):
    """There is not enough to learn from."""

    def __init__(self, message: str, *, num_missing: int) -> None:
        super().__init__(message)
        self.num_missing = num_missing


class TrainingError(OptimizerError):
    """A trainer ended without an adapter."""


class TrainingDoesNotFit(OptimizerError, ValueError):
    """The chosen GPU has too little memory, by arithmetic; nothing was started."""
