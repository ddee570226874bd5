"""Answers of the Responses API, stored as they were sent.

Deleting a response deletes the client's copy, not the trajectory. Invariants: a conversation is returned whole or not
at all; another tenant's response is treated like an unknown one.
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
        """Store a response; durable on return."""
        values = response.model_dump()
        await self._database.write(lambda session: session.execute(insert(StoredResponse).values(**values)))

    def get(self, response_id: str, *, tenant: str = "") -> StoredResponse:
        """Return one response. Raises: UnknownResponse."""
        with self._database.read() as session:
            return _require(session, response_id, tenant)

    def conversation(
        self, response_id: str, *, tenant: str = "", max_responses: int | None = None, max_chars: int | None = None
    ) -> list[StoredResponse]:
        """Return the conversation that ends with this response, oldest first.

        Raises:
            UnknownResponse: also when an earlier response was deleted.
            ConversationTooLong: over `max_responses`, or over `max_chars` as JSON. Checked before any body is read.
        """
        with self._database.read() as session:
            ids = _trace(session, response_id, tenant, max_responses, max_chars)
            return [_require(session, each, tenant) for each in reversed(ids)]

    async def delete(self, response_id: str, *, tenant: str = "") -> None:
        """Delete a response. Raises: UnknownResponse."""
        await self._database.write(lambda session: session.delete(_require(session, response_id, tenant)))


def _trace(
    session: Session, response_id: str, tenant: str, max_responses: int | None, max_chars: int | None
) -> list[str]:
    """Return the ids of a conversation, newest first. Raises: UnknownResponse, ConversationTooLong."""
    # The database measures the lengths: bodies may be megabytes.
    num_input_chars, num_body_chars = (
        func.length(cast(column, Text)) for column in (col(StoredResponse.input), col(StoredResponse.body))
    )
    query = select(col(StoredResponse.tenant), col(StoredResponse.previous_id), num_input_chars + num_body_chars)
    ids: list[str] = []
    next_id: str | None = response_id
    total = 0
    while next_id is not None:
        # a query for each response: max_responses bounds them. Of another tenant means unknown
        row = session.execute(query.where(col(StoredResponse.id) == next_id)).one_or_none()
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
