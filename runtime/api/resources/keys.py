"""Routes for API keys: create, list and revoke them.

Invariant: the secret of a key is in the answer that created it and nowhere else; the rows hold its hash.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Body
from fastapi.openapi.models import Example
from pydantic import BaseModel, Field

from memory.records.keys import MAX_LIMIT
from memory.schema import ApiKey, Scope
from runtime.api.errors import CREATED, Conflict, NotFound, error_responses
from runtime.api.services import Server

router = APIRouter(prefix="/v1/keys", tags=["keys"])


class KeyRequest(BaseModel, extra="forbid"):
    """The name, scopes, tenant and quotas of a new key."""

    name: str = Field(min_length=1, max_length=200, examples=["shop frontend"])
    scopes: list[Scope] = Field(min_length=1, description="`admin` includes all others.")
    tenant: str = Field(default="", description="The tenant whose data it can access; empty is the default tenant.")
    requests_per_minute: int | None = Field(default=None, ge=1, le=MAX_LIMIT, description="Without it, no limit.")
    tokens_per_minute: int | None = Field(
        default=None, ge=1, le=MAX_LIMIT, description="Prompt and output; without it, no limit."
    )


class KeyDetail(BaseModel):
    """A key without its secret. `last_used_at` is accurate to the minute."""

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
    """A key that manages keys, with its secret, which no later answer contains."""

    key: str


class NewKey(KeyDetail):
    """A key with its secret, which no later answer contains. `operator`: a second key that manages keys, created
    because none was in force."""

    key: str
    operator: OperatorKey | None = None


class KeyList(BaseModel):
    """All keys, revoked ones too, oldest first."""

    object: str = "list"
    data: list[KeyDetail]


EXAMPLE: dict[str, Example] = {
    "a client": {"value": {"name": "shop frontend", "scopes": ["infer", "feedback"], "tenant": "shop"}}
}


# Two keys in one transaction: between them the server would already require a key that nobody has.
@router.post("", status_code=CREATED, summary="Create a key")
async def create_key(server: Server, body: Annotated[KeyRequest, Body(openapi_examples=EXAMPLE)]) -> NewKey:
    """From the first key on, the server requires a key for every request. Therefore, if no key of the default tenant
    with the scope `admin` is in force and the new one isn't such a key, one is created too and returned as
    `operator`."""
    (row, key), operator_key = await server.memory.keys.create_for_operator(
        body.name,
        body.scopes,
        tenant=body.tenant,
        requests_per_minute=body.requests_per_minute,
        tokens_per_minute=body.tokens_per_minute,
    )
    operator = None
    if operator_key is not None:
        operator_row, secret = operator_key
        operator = OperatorKey(**describe_key(operator_row).model_dump(), key=secret)
    return NewKey(**describe_key(row).model_dump(), key=key, operator=operator)


@router.get("", summary="List all keys")
async def list_keys(server: Server) -> KeyList:
    return KeyList(data=[describe_key(row) for row in server.memory.keys.select()])


@router.post("/{key_id}/revoke", summary="Revoke a key", responses=error_responses(NotFound, Conflict))
async def revoke_key(key_id: str, server: Server) -> KeyDetail:
    """Takes effect at once and cannot be undone; requests under way are still answered. The last key that manages keys
    cannot be revoked (409)."""
    return describe_key(await server.memory.keys.revoke(key_id))


def describe_key(row: ApiKey) -> KeyDetail:
    return KeyDetail.model_validate(row, from_attributes=True)
