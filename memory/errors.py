"""The errors of memory, one leaf for each that a caller can act on.

    StoreError
    +-- StorageError             the disk or the server failed: full, unreadable, read-only, unreachable
    |   +-- DatabaseTooNew       written by a later version of this program
    +-- DataDirectoryInUse       another process owns the directory
    +-- UnknownRow               no row has that id (also a LookupError)
    |   +-- UnknownTrajectory
    |   +-- UnknownInsight
    |   +-- UnknownStep
    |   +-- UnknownPolicy
    |   +-- UnknownDocument
    |   +-- UnknownCycle
    |   +-- UnknownResponse
    |   +-- UnknownKey
    |   +-- UnknownExample
    +-- IllegalMove              a stage cannot move there (also a ValueError)
    |   +-- NothingToRollBackTo
    |   +-- LastOperatorKey      without it nobody could manage keys
    +-- OtherBaseModel           the directory's policies are made for another base model (also a ValueError)
    +-- CycleInProgress          only one cycle at a time
    +-- ConversationTooLong      more responses, or longer ones, than the caller allows
    +-- FeedbackConflict         the same feedback id with another body
    +-- IndexUnavailable         the vector index or the encoder gives no answer (a search does without)
    |   +-- IndexDamaged         the vector index must be reopened or rebuilt
    +-- DocumentTooLong          more passages than are allowed (also a ValueError)
    +-- AdapterRefused           an adapter directory that must not be loaded
    ReplayMismatch               an environment did not answer the calls of a recorded episode as it did then

Invalid arguments are plain `ValueError`s.

The error that ended an episode is stored as text: `describe_error` writes it, `read_error` and `find_spent_budget` read
it.
"""

from __future__ import annotations

from enum import Enum, auto


def describe_error(error: BaseException) -> str:
    """Return an error as a trajectory stores it."""
    return f"{type(error).__name__}: {error}"


def read_error(stored: str | None) -> tuple[str, str]:
    """Return (name of the class, message) of a stored error."""
    kind, _, message = (stored or "").partition(": ")
    return kind, message


class SpentBudget(Enum):
    """The budget that an episode had used up when it was ended."""

    CONTEXT = auto()
    TIME = auto()
    CALLS = auto()  # its steps or tokens


def find_spent_budget(stored: str | None) -> SpentBudget | None:
    """Return which budget a stored error says was spent; None where it says something else."""
    kind, message = read_error(stored)
    if kind != "BudgetExceeded":
        return None
    # the messages are those of runtime/engine/client.py, and of graph.py and state.py in runtime/agent
    if "context" in message:
        return SpentBudget.CONTEXT
    return SpentBudget.TIME if "second" in message else SpentBudget.CALLS


class StoreError(Exception):
    """The base class of memory's errors."""


class StorageError(StoreError):
    """The disk or the server failed. Acknowledged writes are safe, and the failed one left nothing behind.

    One exception, which the message names: a server lost during a commit may have stored the write.
    """


class DatabaseTooNew(StorageError):
    """The database was written by a later version of this program."""


class DataDirectoryInUse(StoreError):
    """Another process owns the data directory. `url` is its address, if known."""

    def __init__(self, message: str, *, url: str | None = None) -> None:
        super().__init__(message)
        self.url = url


class UnknownRow(StoreError, LookupError):
    """No row has that id."""


class UnknownTrajectory(UnknownRow):
    """No trajectory has that id."""


class UnknownInsight(UnknownRow):
    """No insight has that id."""


class UnknownStep(UnknownRow):
    """The trajectory has no such step."""


class UnknownPolicy(UnknownRow):
    """No policy has that version."""


class UnknownDocument(UnknownRow):
    """No document has that id."""


class UnknownExample(UnknownRow):
    """No example has that id."""


class DocumentTooLong(StoreError, ValueError):
    """A document has more passages than `memory.max_document_passages`."""


class UnknownCycle(UnknownRow):
    """No cycle has that id."""


class UnknownResponse(UnknownRow):
    """No response has that id, or it was deleted."""


class UnknownKey(UnknownRow):
    """No API key has that id."""


class IllegalMove(StoreError, ValueError):
    """A stage cannot make this move."""


class NothingToRollBackTo(IllegalMove):
    """No policy was active before the active one."""


class LastOperatorKey(IllegalMove):
    """The key is the last one that can manage keys."""


class OtherBaseModel(StoreError, ValueError):
    """The data directory's policies are made for another base model."""


class CycleInProgress(StoreError):
    """A cycle is open already."""


class ConversationTooLong(StoreError):
    """A conversation of stored responses is longer than the caller allows."""


class FeedbackConflict(StoreError):
    """The feedback id was posted before with another body."""


class IndexUnavailable(StoreError):
    """The vector index gives no answer: the encoder or the index is not ready."""


class IndexDamaged(IndexUnavailable):
    """The vector index failed. It is reopened, then rebuilt from the rows."""


class AdapterRefused(StoreError):
    """The adapter directory failed verification; the engine must never load it."""


class ReplayMismatch(Exception):
    """An environment did not answer the calls of a recorded episode as it did then; the message says how. Nothing was
    recorded, and one branch of a search is lost, never the cycle."""
