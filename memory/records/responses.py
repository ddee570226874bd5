"""Answers of the Responses API, kept as they were sent.

This module refuses to know what an item means. Deleting a response forgets the copy kept for its client, not the
trajectory that was lived. Invariants: a conversation is found whole or not at all; another tenant's response is one
that was never stored.
"""

from __future__ import annotations

from sqlalchemy import Text, cast, func, insert, select
from sqlmodel import Session, col

from memory.errors import ConversationTooLong, UnknownResponse
from memory.schema import StoredResponse
from memory.storage.database import Database


class Responses:
    """All stored responses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, response: StoredResponse) -> None:
        """Store it; durable when it returns."""
        values = response.model_dump()
        await self._database.write(lambda session: session.execute(insert(StoredResponse).values(**values)))

    def get(self, response_id: str, *, tenant: str = "") -> StoredResponse:
        """Return one response. Raises: UnknownResponse."""
        with self._database.read() as session:
            return _require(session, response_id, tenant)

    def conversation(
        self, response_id: str, *, tenant: str = "", max_responses: int | None = None, max_chars: int | None = None
    ) -> list[StoredResponse]:
        """Return the responses that led to this one, oldest first, itself last.

        Raises:
            UnknownResponse: also when one on the way was deleted.
            ConversationTooLong: there are more of them, or they are longer as JSON; none of them has been read then.
        """
        with self._database.read() as session:
            ids = _trace(session, response_id, tenant, max_responses, max_chars)
            return [_require(session, each, tenant) for each in reversed(ids)]

    async def delete(self, response_id: str, *, tenant: str = "") -> None:
        """Forget it. Raises: UnknownResponse."""
        await self._database.write(lambda session: session.delete(_require(session, response_id, tenant)))


def _trace(
    session: Session, response_id: str, tenant: str, max_responses: int | None, max_chars: int | None
) -> list[str]:
    """Return the ids of a conversation, the newest first. Raises: UnknownResponse, ConversationTooLong."""
    num_chars = sum(func.length(cast(column, Text)) for column in (col(StoredResponse.input), col(StoredResponse.body)))
    found = select(col(StoredResponse.tenant), col(StoredResponse.previous_id), num_chars)
    ids: list[str] = []
    next_id: str | None = response_id
    total = 0
    while next_id is not None:
        row = session.execute(found.where(col(StoredResponse.id) == next_id)).one_or_none()
        if row is None or row[0] != tenant:
            raise _unknown(next_id)
        ids.append(next_id)
        next_id, total = row[1], total + row[2]
        if max_responses is not None and len(ids) > max_responses:
            raise ConversationTooLong(f"the conversation has more than {max_responses} responses: begin another")
        if max_chars is not None and total > max_chars:
            raise ConversationTooLong(f"the conversation has more than {max_chars} characters: begin another")
    return ids


def _unknown(response_id: str) -> UnknownResponse:
    return UnknownResponse(f"no response has the id {response_id!r}: it was never stored, or was deleted")


def _require(session: Session, response_id: str, tenant: str) -> StoredResponse:
    response = session.get(StoredResponse, response_id)
    if response is None or response.tenant != tenant:
        raise _unknown(response_id)
    return response
