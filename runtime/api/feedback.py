"""What people and programs say of an episode: thumbs, numbers, words, corrections.

Refuses to know what becomes of it. One id, one body: posting the same again changes nothing, another body is refused.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from fastapi import APIRouter, Body
from pydantic import BaseModel, Field, field_validator, model_validator

from memory.schema import Feedback
from memory.store import Memory
from runtime.api.access import Asker
from runtime.api.answer_ids import trajectory_of
from runtime.api.errors import CREATED, BadRequest, Conflict, NotFound, refusals
from runtime.api.services import Server

router = APIRouter(prefix="/v1/feedback", tags=["feedback"])


class FeedbackRequest(BaseModel, extra="forbid"):
    """One thing said of one episode. Name the episode in exactly one of the three ways."""

    target: str | None = Field(default=None, description="The `id` of an answer, a response or a trajectory.")
    inference_id: str | None = Field(default=None, description="The same, under the name other gateways use.")
    episode_id: str | None = Field(default=None, description="The episode; its newest trajectory is meant.")
    name: str = Field(default="reward", min_length=1, max_length=200, description="What is judged.")
    value: bool | int | float | str | None = Field(
        default=None,
        union_mode="smart",
        description="true or false, or a number in [0, 1]: becomes a reward. A category or a text is kept as it is.",
    )
    comment: str | None = None
    correction: str | None = Field(default=None, description="What the answer should have been: a demonstration.")
    source: str = "user"
    id: str | None = Field(default=None, min_length=1, max_length=200, description="Yours, so that a retry is safe.")
    tags: dict[str, str] = {}

    @field_validator("value")
    @classmethod
    def _value_is_finite(cls, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number must be finite")
        return value

    @model_validator(mode="after")
    def _names_one_episode(self) -> Self:
        given = [name for name in ("target", "inference_id", "episode_id") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of target, inference_id, episode_id; there are {len(given)}")
        if self.value is None and self.comment is None and self.correction is None:
            raise ValueError("it says nothing: give a value, a comment or a correction")
        return self


class FeedbackAnswer(BaseModel):
    """Where it was kept."""

    feedback_id: str
    trajectory_id: str
    is_new: bool


EXAMPLES = {
    "thumb": {"summary": "It was good", "value": {"target": "tr_0199...", "value": True}},
    "number": {
        "summary": "Half right, safe to retry",
        "value": {"target": "tr_0199...", "value": 0.5, "comment": "wrong date", "id": "ticket-4711"},
    },
    "correction": {
        "summary": "What it should have said",
        "value": {"target": "tr_0199...", "value": False, "correction": "The invoice is due on May 2."},
    },
}


@router.post(
    "",
    status_code=CREATED,
    summary="Say how an episode went",
    responses=refusals(BadRequest, NotFound, Conflict),
)
async def post_feedback(
    server: Server, caller: Asker, body: Annotated[FeedbackRequest, Body(openapi_examples=EXAMPLES)]
) -> FeedbackAnswer:
    """Keep it, durably. May come before the episode has closed. The same `id` and body again is answered 201 with
    `is_new: false`; the same `id` with another body is a conflict."""
    kept, is_new = await server.memory.feedback.post(
        Feedback(
            tenant=caller.tenant,
            id=body.id or "",
            trajectory_id=_find_trajectory(body, server.memory, caller.tenant),
            name=body.name,
            value=body.value,
            comment=body.comment,
            correction=body.correction,
            source=body.source,
            tags=body.tags,
        )
    )
    return FeedbackAnswer(feedback_id=kept.id, trajectory_id=kept.trajectory_id, is_new=is_new)


def _find_trajectory(body: FeedbackRequest, memory: Memory, tenant: str) -> str:
    if body.episode_id is None:
        return trajectory_of(body.target or body.inference_id or "")
    found = memory.trajectories.newest_of(body.episode_id, tenant=tenant)
    if found is None:
        raise NotFound(f"no episode has the id {body.episode_id!r}", param="episode_id", code="episode_not_found")
    return found.id
