"""Stored responses: read, continued, deleted."""

from __future__ import annotations

import pytest

from memory.errors import UnknownResponse
from memory.schema import StoredResponse
from memory.store import Memory
from tests.memory.episodes import play


async def keep(memory: Memory, response_id: str, previous_id: str | None = None) -> None:
    trajectory = await play(memory)
    row = StoredResponse(id=response_id, trajectory_id=trajectory.id, previous_id=previous_id, body={"id": response_id})
    await memory.responses.save(row)


async def test_a_conversation_is_found_from_its_last_response(memory: Memory):
    for response_id, previous_id in (("one", None), ("two", "one"), ("other", "one"), ("three", "two")):
        await keep(memory, response_id, previous_id)
    assert [response.id for response in memory.responses.conversation("three")] == ["one", "two", "three"]
    assert memory.responses.get("two").body == {"id": "two"}


async def test_a_conversation_with_a_hole_is_not_found(memory: Memory):
    await keep(memory, "one")
    await keep(memory, "two", "one")
    await memory.responses.delete("one")
    with pytest.raises(UnknownResponse, match=r"'one'.*deleted"):
        memory.responses.conversation("two")
    with pytest.raises(UnknownResponse):
        await memory.responses.delete("one")
