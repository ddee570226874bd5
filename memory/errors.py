"""What can go wrong in keeping and finding, one leaf for each thing a caller can act on.

    StoreError
    +-- StorageError             the disk or the server refused: full, unreadable, read-only, away
    |   +-- DatabaseTooNew       written by a later version of this program
    +-- DataDirectoryInUse       another process owns the directory
    +-- UnknownRow               nothing has that id (also a LookupError)
    |   +-- UnknownTrajectory
    |   +-- UnknownStep
    |   +-- UnknownPolicy
    |   +-- UnknownDocument
    |   +-- UnknownCycle
    |   +-- UnknownResponse
    |   +-- UnknownKey
    +-- IllegalMove              a stage may not go there (also a ValueError)
    |   +-- NothingToRollBackTo
    |   +-- LastOperatorKey      without it nobody could manage keys any more
    +-- OtherBaseModel           the directory's policies stand on another base model (also a ValueError)
    +-- CycleInProgress          one turn of the loop at a time
    +-- ConversationTooLong      more responses, or longer ones, than the caller reads
    +-- FeedbackConflict         the same feedback id with another body
    +-- IndexUnavailable         no meanings for now (never reaches a request: words must do)
    |   +-- IndexDamaged         the index of meanings must be made anew
    +-- DocumentTooLong          more passages than are allowed (also a ValueError)
    +-- AdapterRefused           an adapter directory that must not reach the engine

This module refuses to know about HTTP. Bad arguments are plain `ValueError`s.
"""

from __future__ import annotations


class StoreError(Exception):
    """The root of everything raised by memory on purpose."""


class StorageError(StoreError):
    """The disk or the server refused. What was acknowledged before is safe; the refused write left nothing behind, but
    where the message doubts it: a server was lost in the moment of its commit.
    """


class DatabaseTooNew(StorageError):
    """The database was written by a later version of this program."""


class DataDirectoryInUse(StoreError):
    """Another process owns the data directory. `url`: where it answers, if it says so."""

    def __init__(self, message: str, *, url: str | None = None) -> None:
        super().__init__(message)
        self.url = url


class UnknownRow(StoreError, LookupError):
    """Nothing has that id."""


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


class DocumentTooLong(StoreError, ValueError):
    """A document has more passages than `memory.max_document_passages`."""


class UnknownCycle(UnknownRow):
    """No cycle has that id."""


class UnknownResponse(UnknownRow):
    """No response has that id, or it was deleted."""


class UnknownKey(UnknownRow):
    """No API key has that id."""


class IllegalMove(StoreError, ValueError):
    """A stage may not go there from where it is."""


class NothingToRollBackTo(IllegalMove):
    """No policy was active before the active one."""


class LastOperatorKey(IllegalMove):
    """The key is the last one with which keys can be managed."""


class OtherBaseModel(StoreError, ValueError):
    """The data directory's policies stand on another base model."""


class CycleInProgress(StoreError):
    """A cycle is open already; one turn of the loop at a time."""


class ConversationTooLong(StoreError):
    """A conversation of stored responses is longer than the caller reads."""


class FeedbackConflict(StoreError):
    """That feedback id was posted before, with another body."""


class IndexUnavailable(StoreError):
    """Meanings cannot be found for now: no encoder, or no index."""


class IndexDamaged(IndexUnavailable):
    """The index of meanings failed: opened again, or made anew from the rows, it heals."""


class AdapterRefused(StoreError):
    """The adapter directory is not what it must be; the engine must never see it."""
