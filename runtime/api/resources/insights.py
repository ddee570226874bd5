"""Routes for insights, lessons that a cycle derives from graded episodes: list, approve, edit and retire them.

An operator approves an insight for the whole tenant, edits its text or retires it; the decision is recorded with the
API key of the request.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Body, Response
from pydantic import BaseModel, Field

from memory.records.reviews import Status
from memory.schema import Insight, Trust
from runtime.api.errors import Conflict, NotFound, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.read_answers import MAX_ROWS, Limit, Offset, answer_from_thread, next_offset
from runtime.api.services import Server

router = APIRouter(prefix="/v1/insights", tags=["insights"])

ShownTo = Literal["tenant", "user", "nobody"]
InsightText = Annotated[str, Field(min_length=1, max_length=10_000)]


class InsightDetail(BaseModel):
    """A lesson for one kind of task; `wins` and `losses` count the episodes that followed it."""

    id: str
    environment: str
    kind: str
    text: str
    shown_to: ShownTo
    user_id: str = Field(description="The user from whose episodes it was derived; empty for the whole tenant.")
    trust: Trust
    strength: int
    wins: int
    losses: int
    wins_otherwise: int
    losses_otherwise: int
    created_at: datetime
    approved_at: datetime | None
    retired_at: datetime | None


class InsightPage(BaseModel):
    """Strongest first; `next_offset` is the `offset` of the next page."""

    object: str = "list"
    data: list[InsightDetail]
    next_offset: int | None


class Approval(BaseModel, extra="forbid"):
    """Approves a memory as it is, or with another text."""

    text: InsightText | None = None


class Edit(BaseModel, extra="forbid"):
    """The new text."""

    text: InsightText


@router.get("", summary="List insights, strongest first", response_model=InsightPage)
async def list_insights(
    server: Server,
    caller: RequestCaller,
    environment: str | None = None,
    kind: str | None = None,
    status: Status = Status.ACTIVE,
    limit: Limit = MAX_ROWS,
    offset: Offset = 0,
) -> Response:
    """`active`: all in use. `pending`: the active ones that are shown to one user or nobody, untrusted ones among
    them; approval would show them to the whole tenant. `approved`, `retired`: by an operator. `removed`: because of
    evidence."""

    def read() -> InsightPage:
        rows = server.memory.reviews.insights(
            tenant=caller.tenant, status=status, environment=environment, kind=kind, limit=limit, offset=offset
        )
        data = [describe_insight(row.insight, row.scope) for row in rows]
        return InsightPage(data=data, next_offset=next_offset(offset, len(data), limit))

    return await answer_from_thread(read)


@router.post(
    "/{insight_id}/approve", summary="Show a lesson to the whole tenant", responses=error_responses(NotFound, Conflict)
)
async def approve_insight(
    insight_id: str, server: Server, caller: RequestCaller, body: Annotated[Approval | None, Body()] = None
) -> InsightDetail:
    """If the tenant already has an insight with the same text, that one is approved and returned."""
    row = await server.memory.reviews.approve_insight(
        insight_id, tenant=caller.tenant, key_id=caller.key_id, text=body.text if body is not None else None
    )
    return describe_insight(row, "")


@router.post("/{insight_id}/edit", summary="Edit the text of a lesson", responses=error_responses(NotFound, Conflict))
async def edit_insight(insight_id: str, server: Server, caller: RequestCaller, body: Edit) -> InsightDetail:
    """Its audience stays the same."""
    row = await server.memory.reviews.edit_insight(insight_id, body.text, tenant=caller.tenant, key_id=caller.key_id)
    return describe_insight(row.insight, row.scope)


@router.post("/{insight_id}/retire", summary="Stop showing a lesson", responses=error_responses(NotFound))
async def retire_insight(insight_id: str, server: Server, caller: RequestCaller) -> InsightDetail:
    """No later evidence restores it."""
    row = await server.memory.reviews.retire_insight(insight_id, tenant=caller.tenant, key_id=caller.key_id)
    return describe_insight(row, None)


def describe_insight(insight: Insight, scope: str | None) -> InsightDetail:
    """Return the detail of an insight; `scope` is a user's id, empty for the tenant, None for nobody."""
    copied = InsightDetail.model_fields.keys() - {"shown_to"}
    scope = None if insight.removed_at is not None else scope
    return InsightDetail(**{name: getattr(insight, name) for name in copied}, shown_to=name_scope(scope))


def name_scope(scope: str | None) -> ShownTo:
    # None is nobody and empty is the tenant: a test of truth alone would mix them up.
    if scope is None:
        return "nobody"
    return "user" if scope else "tenant"
