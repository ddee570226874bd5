"""Lessons in words, with the counts that speak for them.

Refuses to change them: insights come from graded episodes, in a cycle.
"""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter
from pydantic import BaseModel

from runtime.api.access import Asker
from runtime.api.services import Server

router = APIRouter(prefix="/v1/insights", tags=["insights"])


class InsightDetail(BaseModel):
    """A lesson for one kind of task; `wins` and `losses` count the episodes that did what it says."""

    id: str
    environment: str
    kind: str
    text: str
    strength: int
    wins: int
    losses: int
    wins_otherwise: int
    losses_otherwise: int
    created_at: datetime


class InsightList(BaseModel):
    """Strongest first."""

    object: str = "list"
    data: list[InsightDetail]


@router.get("", summary="List the lessons that count, strongest first")
async def list_insights(
    server: Server, caller: Asker, environment: str | None = None, kind: str | None = None
) -> InsightList:
    rows = server.memory.insights.active(environment, kind, tenant=caller.tenant)
    ranked = sorted(rows, key=lambda row: (-row.strength, row.losses - row.wins, row.text))
    return InsightList(data=[InsightDetail.model_validate(row, from_attributes=True) for row in ranked])
