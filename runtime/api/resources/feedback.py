"""The route that stores feedback on episodes: thumbs, numbers, categories, comments, corrections.

Invariant: an id stands for one body. Posting the same body again changes nothing; another body under the id is a
conflict.
"""

from __future__ import annotations

import math
from typing import Annotated, Self, TypedDict

from fastapi import APIRouter, Body, Response
from fastapi.openapi.models import Example
from pydantic import BaseModel, Field, field_validator, model_validator

from memory.schema import Feedback
from memory.store import Memory
from runtime.api.errors import CREATED, OK, Conflict, NotFound, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.openai.answer_ids import start_of, trajectory_of
from runtime.api.openai.chat_request import check_person
from runtime.api.services import Server

REWARD = "reward"
"""The default name, and the only one under which a text value must be one of `REWARD_WORDS`."""
REWARD_WORDS: dict[str, bool] = {
    **dict.fromkeys(("thumbs_up", "up", "like", "good", "positive", "yes", "true", "\N{THUMBS UP SIGN}"), True),
    **dict.fromkeys(
        ("thumbs_down", "down", "dislike", "bad", "negative", "no", "false", "\N{THUMBS DOWN SIGN}"), False
    ),
}
"""Texts that chat interfaces and gateways send as rewards."""
FeedbackValue = bool | int | float | str | None

router = APIRouter(prefix="/v1/feedback", tags=["feedback"])


class Target(BaseModel, extra="forbid"):
    """The subject of feedback: exactly one of three names of the episode, optionally with one of its steps."""

    target: str | None = Field(default=None, description="The `id` of an answer, a response or a trajectory.")
    inference_id: str | None = Field(default=None, description="The same, under the name other gateways use.")
    episode_id: str | None = Field(default=None, description="The episode; selects its newest trajectory.")
    step: int | None = Field(
        default=None, ge=0, lt=2**31, description="The position of a step; the feedback applies to it alone."
    )

    @model_validator(mode="after")
    def _names_one_episode(self) -> Self:
        names = [name for name in ("target", "inference_id", "episode_id") if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(f"give exactly one of target, inference_id, episode_id; there are {len(names)}")
        return self


class FeedbackRequest(Target):
    """Feedback on one episode, one answer or one step."""

    name: str = Field(default=REWARD, min_length=1, max_length=200, description="The rated property.")
    value: FeedbackValue = Field(
        default=None,
        union_mode="smart",  # `true` and 1 must stay apart: retries compare bodies as JSON
        description="true, false or a number in [0, 1]: a reward of the whole episode, whatever the `name`. A text "
        "under the name `reward` is a word such as `thumbs_up`; under another one it is a category, stored unchanged.",
    )
    comment: str | None = None
    correction: str | None = Field(
        default=None,
        min_length=1,
        description="The better answer. The next cycle learns it if your key has the scope `teach`.",
    )
    source: str = Field(
        default="user", min_length=1, max_length=200, description="The author. `judge` and `code` are trusted less."
    )
    id: str | None = Field(
        default=None, min_length=1, max_length=200, description="An id of yours, so that a retry is safe."
    )
    tags: dict[str, str] = {}
    user: str | None = Field(default=None, description="The person who gave it; by default the episode's.")

    @field_validator("value")
    @classmethod
    def _require_finite(cls, value: FeedbackValue) -> FeedbackValue:
        # Python's JSON parser accepts NaN and Infinity, and every comparison with NaN is false.
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number must be finite")
        return value

    @model_validator(mode="after")
    def _parse_reward(self) -> Self:
        if self.name == REWARD:
            # Assigned without validation, as pydantic does by default: a validator on assignment would call this again.
            self.value = parse_reward(self.value)
        return self

    @model_validator(mode="after")
    def _require_content(self) -> Self:
        if self.value is None and self.comment is None and self.correction is None:
            raise ValueError("the feedback is empty: give a value, a comment or a correction")
        return self


class FeedbackAnswer(BaseModel):
    """The ids of the stored feedback; `is_new` is false if the same was stored before."""

    feedback_id: str
    trajectory_id: str
    is_new: bool


EXAMPLES: dict[str, Example] = {
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
        "summary": "One step was wrong, whatever the outcome",
        "value": {"episode_id": "ticket-4711", "step": 2, "value": False, "comment": "asked for what it knew"},
    },
}


@router.post(
    "",
    status_code=CREATED,
    summary="Give feedback on an episode",
    responses={
        OK: {"model": FeedbackAnswer, "description": "The same feedback was posted before under this `id`."},
        **error_responses(NotFound, Conflict),
    },
)
async def post_feedback(
    server: Server,
    caller: RequestCaller,
    response: Response,
    body: Annotated[FeedbackRequest, Body(openapi_examples=EXAMPLES)],
) -> FeedbackAnswer:
    """Stores it durably before answering. It may arrive before the episode has closed or at any time after. The same
    `id` and body again is answered 200 with the stored row; the same `id` with another body is a conflict (409)."""
    stored, is_new = await server.memory.feedback.post(
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
    return FeedbackAnswer(feedback_id=stored.id, trajectory_id=stored.trajectory_id, is_new=is_new)


def parse_reward(value: FeedbackValue) -> bool | int | float | None:
    """Return the reward that a posted value means.

    Raises:
        ValueError: a text outside `REWARD_WORDS`; stored unchanged, it would look like a reward and count as nothing.
    """
    if not isinstance(value, str):
        return value
    word = value.strip().lower().replace("-", "_").replace(" ", "_")
    if word not in REWARD_WORDS:
        allowed = ", ".join(repr(known) for known in REWARD_WORDS if known.isascii())
        raise ValueError(
            f"the reward {value[:80]!r} is not understood: give true, false, a number from 0 to 1, or one of {allowed};"
            " a category needs a `name` of its own, and a text belongs in `comment`"
        )
    return REWARD_WORDS[word]


class TargetColumns(TypedDict):
    """The columns of a feedback row, and of a signed link, that identify its subject."""

    target: str
    trajectory_id: str
    answer_start: int | None
    step: int | None


def find_target(body: Target, memory: Memory, tenant: str) -> TargetColumns:
    """Return the columns that identify the target.

    Raises:
        NotFound, UnknownTrajectory: this tenant has no such episode.
    """
    if body.episode_id is None:
        name = body.target or body.inference_id or ""
        trajectory_id = memory.trajectories.get(trajectory_of(name), tenant=tenant).id
        answer_start = start_of(name)
    else:
        name, answer_start = body.episode_id, None
        # A retry may find a newer trajectory: therefore bodies are compared without the trajectory's id.
        newest = memory.trajectories.newest_of(name, tenant=tenant)
        if newest is None:
            raise NotFound(f"no episode has the id {name!r}", param="episode_id", code="episode_not_found")
        trajectory_id = newest.id
    return {"target": name, "trajectory_id": trajectory_id, "answer_start": answer_start, "step": body.step}
