"""Answers of the Responses API, kept as they were sent.

This module refuses to know what an item means. Deleting a response forgets the copy kept for its client, not the
trajectory that was lived. Invariants: a conversation is found whole or not at all; another tenant's response is one
that was never stored.
"""

from __future__ import annotations

import builtins

from sqlalchemy import insert
from sqlmodel import Session

from memory.database import Database
from memory.errors import UnknownResponse
from memory.schema import StoredResponse


class Responses:
    """All stored responses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def keep(self, response: StoredResponse) -> None:
        """Store it; durable when it returns."""
        values = response.model_dump()
        await self._database.write(lambda session: session.execute(insert(StoredResponse).values(**values)))

    def get(self, response_id: str, *, tenant: str = "") -> StoredResponse:
        """Return one response. Raises: UnknownResponse."""
        with self._database.read() as session:
            return _require(session, response_id, tenant)

    def conversation(self, response_id: str, *, tenant: str = "") -> builtins.list[StoredResponse]:
        """Return the responses that led to this one, oldest first, itself last.

        Raises: UnknownResponse, also when one on the way was deleted.
        """
        chain = []
        with self._database.read() as session:
            next_id: str | None = response_id
            while next_id is not None:
                chain.append(_require(session, next_id, tenant))
                next_id = chain[-1].previous_id
        return chain[::-1]

    async def delete(self, response_id: str, *, tenant: str = "") -> None:
        """Forget it. Raises: UnknownResponse."""
        await self._database.write(lambda session: session.delete(_require(session, response_id, tenant)))


def _require(session: Session, response_id: str, tenant: str) -> StoredResponse:
    response = session.get(StoredResponse, response_id)
    if response is None or response.tenant != tenant:
        raise UnknownResponse(f"no response has the id {response_id!r}: it was never stored, or was deleted")
    return response
