"""What people and programs say of an episode: thumbs, numbers, words, corrections.

Refuses to know what becomes of it. One id, one body: posting the same again changes nothing, another body is refused.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from fastapi import APIRouter, Body, Response
from pydantic import BaseModel, Field, field_validator, model_validator

from memory.schema import Feedback
from memory.store import Memory
from runtime.api.errors import CREATED, OK, Conflict, NotFound, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.openai.answer_ids import start_of, trajectory_of
from runtime.api.openai.chat_request import check_person
from runtime.api.resources.feedback_words import read_reward
from runtime.api.services import Server

REWARD = "reward"
"""The default name, and the only one under which a text must mean a reward."""

router = APIRouter(prefix="/v1/feedback", tags=["feedback"])


class Target(BaseModel, extra="forbid"):
    """What is spoken of. Name the episode in exactly one of the three ways; `step` narrows it down."""

    target: str | None = Field(default=None, description="The `id` of an answer, a response or a trajectory.")
    inference_id: str | None = Field(default=None, description="The same, under the name other gateways use.")
    episode_id: str | None = Field(default=None, description="The episode; its newest trajectory is meant.")
    step: int | None = Field(
        default=None, ge=0, lt=2**31, description="The position of the one step that is meant; rewards nothing else."
    )

    @model_validator(mode="after")
    def _names_one_episode(self) -> Self:
        given = [name for name in ("target", "inference_id", "episode_id") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of target, inference_id, episode_id; there are {len(given)}")
        return self


class FeedbackRequest(Target):
    """One thing said of one episode, one answer of it, or one step."""

    name: str = Field(default=REWARD, min_length=1, max_length=200, description="What is judged.")
    value: bool | int | float | str | None = Field(
        default=None,
        union_mode="smart",
        description="true, false, a number in [0, 1], or a word such as `thumbs_up`: becomes a reward. Under another "
        "`name` than `reward`, a category or a text is kept as it is.",
    )
    comment: str | None = None
    correction: str | None = Field(
        default=None,
        min_length=1,
        description="What the answer should have been. The next cycle learns it if your key has the scope `teach`.",
    )
    source: str = Field(
        default="user", min_length=1, max_length=200, description="Who says so. `judge` and `code` are trusted less."
    )
    id: str | None = Field(default=None, min_length=1, max_length=200, description="Yours, so that a retry is safe.")
    tags: dict[str, str] = {}
    user: str | None = Field(default=None, description="The person who says so; if not given, the episode's.")

    @field_validator("value")
    @classmethod
    def _value_is_finite(cls, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number must be finite")
        return value

    @model_validator(mode="after")
    def _reads_reward(self) -> Self:
        if self.name == REWARD:
            self.value = read_reward(self.value)
        return self

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.value is None and self.comment is None and self.correction is None:
            raise ValueError("it says nothing: give a value, a comment or a correction")
        return self


class FeedbackAnswer(BaseModel):
    """Where it was kept."""

    feedback_id: str
    trajectory_id: str
    is_new: bool


EXAMPLES = {
    "thumb": {"summary": "It was good", "value": {"target": "trj_0199...", "value": True}},
    "number": {
        "summary": "Half right, safe to retry",
        "value": {"target": "trj_0199...", "value": 0.5, "comment": "wrong date", "id": "ticket-4711"},
    },
    "correction": {
        "summary": "What it should have said",
        "value": {"target": "trj_0199...", "value": False, "correction": "The invoice is due on May 2."},
    },
    "step": {
        "summary": "One step was wrong, whatever came of it",
        "value": {"episode_id": "ticket-4711", "step": 2, "value": False, "comment": "asked for what it knew"},
    },
}


@router.post(
    "",
    status_code=CREATED,
    summary="Say how an episode went",
    responses={
        OK: {"model": FeedbackAnswer, "description": "The same was posted before under this `id`; nothing changed."},
        **error_responses(NotFound, Conflict),
    },
)
async def post_feedback(
    server: Server,
    caller: RequestCaller,
    response: Response,
    body: Annotated[FeedbackRequest, Body(openapi_examples=EXAMPLES)],
) -> FeedbackAnswer:
    """Keep it, durably. May come before the episode has closed, and any time after. The same `id` and body again is
    answered 200 with the row that was kept; the same `id` with another body is a conflict (409)."""
    kept, is_new = await server.memory.feedback.post(
        Feedback(
            tenant=caller.tenant,
            user_id=check_person("user", body.user) if body.user and body.user.strip() else "",
            key_id=caller.key_id,
            id=body.id or "",
            **find_target(body, server.memory, caller.tenant),
            **body.model_dump(include={"name", "value", "comment", "correction", "source", "tags"}),
        )
    )
    if not is_new:
        response.status_code = OK
    return FeedbackAnswer(feedback_id=kept.id, trajectory_id=kept.trajectory_id, is_new=is_new)


def find_target(body: Target, memory: Memory, tenant: str) -> dict[str, Any]:
    """Return what a piece of feedback keeps of its target, which is this tenant's.

    Raises:
        NotFound, UnknownTrajectory: there is no such thing.
    """
    if body.episode_id is None:
        name = body.target or body.inference_id or ""
        trajectory_id = memory.trajectories.get(trajectory_of(name), tenant=tenant).id
        answer_start = start_of(name)
    else:
        name, answer_start = body.episode_id, None
        found = memory.trajectories.newest_of(name, tenant=tenant)
        if found is None:
            raise NotFound(f"no episode has the id {name!r}", param="episode_id", code="episode_not_found")
        trajectory_id = found.id
    return {"target": name, "trajectory_id": trajectory_id, "answer_start": answer_start, "step": body.step}
