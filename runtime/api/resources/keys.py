"""API keys: made, listed, revoked, by whoever runs the server.

Refuses to tell a key again: it is in the answer that made it, and nowhere else.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Body
from pydantic import BaseModel, Field

from memory.records.keys import MAX_LIMIT
from memory.schema import ApiKey, Scope
from runtime.api.errors import CREATED, Conflict, NotFound, error_responses
from runtime.api.services import Server

router = APIRouter(prefix="/v1/keys", tags=["keys"])


class KeyRequest(BaseModel, extra="forbid"):
    """Who will use the key, and for what."""

    name: str = Field(min_length=1, max_length=200, examples=["shop frontend"])
    scopes: list[Scope] = Field(min_length=1, description="`admin` is all of them.")
    tenant: str = Field(default="", description="Whose data it opens; empty is the default tenant.")
    requests_per_minute: int | None = Field(default=None, ge=1, le=MAX_LIMIT, description="Without it, no limit.")
    tokens_per_minute: int | None = Field(
        default=None, ge=1, le=MAX_LIMIT, description="Prompt and output; without it, no limit."
    )


class KeyDetail(BaseModel):
    """A key, without the key. `last_used_at` is true to the minute."""

    id: str
    name: str
    tenant: str
    scopes: list[Scope]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None


class OperatorKey(KeyDetail):
    """A key that manages keys, told this once."""

    key: str


class NewKey(KeyDetail):
    """A key, told this once. `operator`: a second key, made because none that manages keys was in force."""

    key: str
    operator: OperatorKey | None = None


class KeyList(BaseModel):
    """All keys, revoked ones too, oldest first."""

    object: str = "list"
    data: list[KeyDetail]


EXAMPLE = {"a client": {"value": {"name": "shop frontend", "scopes": ["infer", "feedback"], "tenant": "shop"}}}


@router.post("", status_code=CREATED, summary="Make a key")
async def create_key(server: Server, body: Annotated[KeyRequest, Body(openapi_examples=EXAMPLE)]) -> NewKey:
    """The first key that is made closes the server to everybody without one. So where no key with the scope `admin`
    of the default tenant is in force, and this is none, such a key is made too and returned as `operator`."""
    (row, key), spare = await server.memory.keys.create_for_operator(
        body.name,
        body.scopes,
        tenant=body.tenant,
        requests_per_minute=body.requests_per_minute,
        tokens_per_minute=body.tokens_per_minute,
    )
    operator = None if spare is None else OperatorKey(**describe(spare[0]).model_dump(), key=spare[1])
    return NewKey(**describe(row).model_dump(), key=key, operator=operator)


@router.get("", summary="List all keys")
async def list_keys(server: Server) -> KeyList:
    return KeyList(data=[describe(row) for row in server.memory.keys.select()])


@router.post(
    "/{key_id}/revoke", summary="Have a key open nothing any more", responses=error_responses(NotFound, Conflict)
)
async def revoke_key(key_id: str, server: Server) -> KeyDetail:
    """At once, and for good. What is being answered is answered. The last key that manages keys is kept (409)."""
    return describe(await server.memory.keys.revoke(key_id))


def describe(row: ApiKey) -> KeyDetail:
    return KeyDetail.model_validate(row, from_attributes=True)
