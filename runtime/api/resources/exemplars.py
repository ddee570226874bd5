"""Routes for exemplars, past successes that prompts show again: list, approve, edit and retire them.

An operator approves an exemplar for the whole tenant, optionally with another text, edits its text or retires it; the
decision is recorded with its API key.
Invariant: the trajectory itself is never changed.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Body, Query
from pydantic import BaseModel, Field

from memory.records.reviews import ListedExemplar, Status
from memory.schema import Trust
from runtime.api.errors import Conflict, NotFound, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.openai.answer_ids import trajectory_of
from runtime.api.resources.insights import Approval, Edit, ShownTo, name_scope
from runtime.api.services import Server

router = APIRouter(prefix="/v1/exemplars", tags=["exemplars"])


class ExemplarDetail(BaseModel):
    """An exemplar; `id` is its trajectory's."""

    id: str
    environment: str | None
    kind: str
    task: str | None
    text: str = Field(description="The text that prompts show.")
    shown_to: ShownTo
    user_id: str = Field(description="The user of the episode.")
    trust: Trust
    num_steps: int
    closed_at: datetime | None
    approved_at: datetime | None
    retired_at: datetime | None


class ExemplarPage(BaseModel):
    """Newest first; `next_before` is the `before` of the next page."""

    object: str = "list"
    data: list[ExemplarDetail]
    next_before: str | None


@router.get("", summary="List past successes, newest first")
async def list_exemplars(
    server: Server,
    caller: RequestCaller,
    status: Literal["active", "pending", "approved", "retired"] = "active",
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[str | None, Query(description="`next_before` of the page before.")] = None,
) -> ExemplarPage:
    """`active`: all that are in memory. `pending`: the active ones that are shown to one user or nobody, untrusted
    ones among them; approval would show them to the whole tenant. `approved`, `retired`: by an operator."""
    rows = await asyncio.to_thread(
        server.memory.reviews.exemplars, tenant=caller.tenant, status=Status(status), limit=limit, before_id=before
    )
    data = [describe_exemplar(row) for row in rows]
    return ExemplarPage(data=data, next_before=data[-1].id if len(data) == limit else None)


@router.post(
    "/{trajectory_id}/approve",
    summary="Show a success to the whole tenant",
    responses=error_responses(NotFound, Conflict),
)
async def approve_exemplar(
    trajectory_id: str, server: Server, caller: RequestCaller, body: Annotated[Approval | None, Body()] = None
) -> ExemplarDetail:
    """With `text`, prompts show that text instead. Approving again changes the text."""
    row = await server.memory.reviews.approve_exemplar(
        trajectory_of(trajectory_id),
        tenant=caller.tenant,
        key_id=caller.key_id,
        text=body.text if body is not None else None,
    )
    return describe_exemplar(row)


@router.post(
    "/{trajectory_id}/edit",
    summary="Edit the text in which a success is shown",
    responses=error_responses(NotFound, Conflict),
)
async def edit_exemplar(trajectory_id: str, server: Server, caller: RequestCaller, body: Edit) -> ExemplarDetail:
    """It is shown to the same persons as before. The recorded steps stay as they are."""
    row = await server.memory.reviews.edit_exemplar(
        trajectory_of(trajectory_id), body.text, tenant=caller.tenant, key_id=caller.key_id
    )
    return describe_exemplar(row)


@router.post("/{trajectory_id}/retire", summary="Stop showing a success", responses=error_responses(NotFound))
async def retire_exemplar(trajectory_id: str, server: Server, caller: RequestCaller) -> ExemplarDetail:
    """No insights are derived from it any more. Any trajectory can be retired, also before it is a success."""
    row = await server.memory.reviews.retire_exemplar(
        trajectory_of(trajectory_id), tenant=caller.tenant, key_id=caller.key_id
    )
    return describe_exemplar(row)


def describe_exemplar(row: ListedExemplar) -> ExemplarDetail:
    trajectory = row.trajectory
    copied = ExemplarDetail.model_fields.keys() - {"text", "shown_to"}
    scope = None if trajectory.retired_at is not None else row.scope
    return ExemplarDetail(
        **{name: getattr(trajectory, name) for name in copied}, text=row.text, shown_to=name_scope(scope)
    )
