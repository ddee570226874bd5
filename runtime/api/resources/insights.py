"""Lessons in words, with the counts that speak for them, and what an operator decides about them.

They come from graded episodes, in a cycle. An operator approves one for the whole tenant, puts it into other words, or
retires it; each decision is recorded with the key that made it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Body
from pydantic import BaseModel, Field

from memory.records.reviews import Status
from memory.schema import Insight, Trust
from runtime.api.errors import Conflict, NotFound, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.services import Server

router = APIRouter(prefix="/v1/insights", tags=["insights"])

ShownTo = Literal["tenant", "user", "nobody"]
Words = Annotated[str, Field(min_length=1, max_length=10_000)]


class InsightDetail(BaseModel):
    """A lesson for one kind of task; `wins` and `losses` count the episodes that did what it says."""

    id: str
    environment: str
    kind: str
    text: str
    shown_to: ShownTo
    user_id: str = Field(description="The person whose words it was made of; empty for one of the whole tenant.")
    trust: Trust
    strength: int
    wins: int
    losses: int
    wins_otherwise: int
    losses_otherwise: int
    created_at: datetime
    approved_at: datetime | None
    retired_at: datetime | None


class InsightList(BaseModel):
    """Strongest first."""

    object: str = "list"
    data: list[InsightDetail]


class Approval(BaseModel, extra="forbid"):
    """What is approved: the memory as it is, or in these words."""

    text: Words | None = None


class Edit(BaseModel, extra="forbid"):
    """The better words."""

    text: Words


@router.get("", summary="List the lessons that count, strongest first")
async def list_insights(
    server: Server,
    caller: RequestCaller,
    environment: str | None = None,
    kind: str | None = None,
    status: Status = Status.ACTIVE,
) -> InsightList:
    """`active`: in force. `pending`: of these, those that one person is shown, or nobody, and that approval would show
    to the whole tenant. `approved`, `retired`: by an operator. `removed`: by evidence."""
    rows = server.memory.reviews.insights(tenant=caller.tenant, status=status, environment=environment, kind=kind)
    ranked = sorted(rows, key=lambda row: (-row.insight.strength, row.insight.losses - row.insight.wins))
    return InsightList(data=[describe(row.insight, row.scope) for row in ranked])


@router.post(
    "/{insight_id}/approve", summary="Show a lesson to the whole tenant", responses=error_responses(NotFound, Conflict)
)
async def approve_insight(
    insight_id: str, server: Server, caller: RequestCaller, body: Annotated[Approval | None, Body()] = None
) -> InsightDetail:
    """Where the tenant's own lessons say the same already, that one is approved and answered."""
    row = await server.memory.reviews.approve_insight(
        insight_id, tenant=caller.tenant, key_id=caller.key_id, text=body.text if body is not None else None
    )
    return describe(row, "")


@router.post(
    "/{insight_id}/edit", summary="Put a lesson into other words", responses=error_responses(NotFound, Conflict)
)
async def edit_insight(insight_id: str, server: Server, caller: RequestCaller, body: Edit) -> InsightDetail:
    """Who is shown it stays the same."""
    row = await server.memory.reviews.edit_insight(insight_id, body.text, tenant=caller.tenant, key_id=caller.key_id)
    return describe(row.insight, row.scope)


@router.post("/{insight_id}/retire", summary="Show a lesson to nobody again", responses=error_responses(NotFound))
async def retire_insight(insight_id: str, server: Server, caller: RequestCaller) -> InsightDetail:
    """No evidence brings its words back."""
    row = await server.memory.reviews.retire_insight(insight_id, tenant=caller.tenant, key_id=caller.key_id)
    return describe(row, None)


def describe(insight: Insight, scope: str | None) -> InsightDetail:
    as_they_are = InsightDetail.model_fields.keys() - {"shown_to"}
    scope = None if insight.removed_at is not None else scope
    return InsightDetail(**{name: getattr(insight, name) for name in as_they_are}, shown_to=name_scope(scope))


def name_scope(scope: str | None) -> ShownTo:
    if scope is None:
        return "nobody"
    return "user" if scope else "tenant"
