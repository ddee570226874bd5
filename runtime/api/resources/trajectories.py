"""Routes for trajectories, the records of episodes: list, read and close them.

Invariant: no route changes recorded steps. A client that will not continue its episode can close the trajectory.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from memory.records.trajectories import TrajectoryWithReward
from memory.schema import RewardSource, Split, Step, StepKind, Trajectory, TrajectoryStage
from memory.store import Memory
from memory.team import Role
from runtime.api.errors import Conflict, NotFound, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.openai.answer_ids import trajectory_of
from runtime.api.read_answers import answer_from_thread
from runtime.api.services import Server

router = APIRouter(prefix="/v1/trajectories", tags=["trajectories"])

JsonObject = dict[str, object]


class TrajectorySummary(BaseModel):
    """A trajectory without its steps."""

    id: str
    episode_id: str
    user_id: str
    is_shared: bool
    environment: str | None
    task: str | None
    question: str
    """The first characters of the task's text."""
    kind: str
    split: Split
    policy: str
    stage: TrajectoryStage
    reward: float | None
    success: bool | None
    used_memory: bool
    answer: str | None
    error: str | None
    num_steps: int
    prompt_tokens: int
    output_tokens: int
    num_invalid_tool_calls: int
    branch_of: str | None
    """The trajectory whose first steps a branch replays; null for an episode of its own."""
    branch_position: int | None
    """Number of the replayed steps."""
    opened_at: datetime
    closed_at: datetime | None


class TrajectoryPage(BaseModel):
    """Newest first; `next_before` is the `before` of the next page."""

    object: str = "list"
    data: list[TrajectorySummary]
    next_before: str | None


class StepDetail(BaseModel):
    """One model call or one tool result. Token ids are included on request only."""

    position: int
    kind: StepKind
    role: Role | None
    """In a team: who made the call, or wrote the note."""
    content: str
    tool_calls: list[JsonObject]
    tool_name: str | None
    tool_call_id: str | None
    error: str | None
    finish_reason: str | None
    num_prompt_tokens: int
    num_output_tokens: int
    prompt_token_ids: list[int] | None = None
    output_token_ids: list[int] | None = None
    seconds: float
    created_at: datetime


class RewardDetail(BaseModel):
    """A number in [0, 1] with its source and reason."""

    value: float
    source: RewardSource
    reason: str
    created_at: datetime


class FeedbackDetail(BaseModel):
    """A piece of feedback on the episode."""

    id: str
    user_id: str
    key_id: str | None
    target: str
    step: int | None
    name: str
    value: object
    comment: str | None
    correction: str | None
    source: str
    tags: dict[str, str]
    created_at: datetime


class TrajectoryDetail(TrajectorySummary):
    """A trajectory with its steps, rewards and feedback."""

    key_id: str | None
    task_text: str
    temperature: float | None
    opening: list[JsonObject]
    tools: list[JsonObject]
    memory_text: str
    memory_ids: list[str]
    steps: list[StepDetail]
    rewards: list[RewardDetail]
    feedback: list[FeedbackDetail]


DETAIL_FIELDS = ("key_id", "task_text", "temperature", "opening", "tools", "memory_text", "memory_ids")
COPIED_FIELDS = set(TrajectorySummary.model_fields) - {"policy", "reward", "success", "used_memory", "question"}
"""Fields of the summary that are columns of the row."""
QUESTION_CHARS = 200


@router.get("", summary="List trajectories, newest first")
async def list_trajectories(
    server: Server,
    caller: RequestCaller,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[str | None, Query(description="`next_before` of the previous page.")] = None,
    environment: str | None = None,
    split: Split | None = None,
    policy: Annotated[str | None, Query(examples=["v3"])] = None,
    stage: TrajectoryStage | None = None,
    success: bool | None = None,
    user: Annotated[str | None, Query(description="Only episodes of this person.")] = None,
) -> TrajectoryPage:
    memory = server.memory
    views = await asyncio.to_thread(
        memory.trajectories.select,
        limit=limit,
        before_id=before,
        environment=environment,
        split=split,
        policy=None if policy is None else memory.policies.get(policy).version,
        stage=stage,
        is_success=success,
        tenant=caller.tenant,
        user_id=user,
    )
    data = [describe_trajectory(view) for view in views]
    return TrajectoryPage(data=data, next_before=data[-1].id if len(data) == limit else None)


@router.get(
    "/{trajectory_id}",
    summary="Read one trajectory",
    response_model=TrajectoryDetail,
    responses=error_responses(NotFound),
)
async def get_trajectory(
    trajectory_id: str,
    server: Server,
    caller: RequestCaller,
    token_ids: Annotated[bool, Query(description="Include the exact token ids of every call.")] = False,
) -> Response:
    return await answer_from_thread(
        lambda: read_trajectory(server.memory, trajectory_of(trajectory_id), caller.tenant, with_token_ids=token_ids)
    )


def read_trajectory(memory: Memory, trajectory_id: str, tenant: str, *, with_token_ids: bool) -> TrajectoryDetail:
    """Return a trajectory with all that is recorded of it. Raises: UnknownTrajectory."""
    trajectory = memory.trajectories.get(trajectory_id, tenant=tenant)
    rewards = memory.trajectories.rewards(trajectory_id)
    return TrajectoryDetail(
        **dict(describe_trajectory(memory.trajectories.with_reward(trajectory))),
        **{name: getattr(trajectory, name) for name in DETAIL_FIELDS},
        # Token ids are read in any case, because the counts are their lengths.
        steps=[_describe_step(step, with_token_ids) for step in memory.trajectories.steps(trajectory_id)],
        rewards=[RewardDetail.model_validate(row, from_attributes=True) for row in rewards],
        feedback=[
            FeedbackDetail.model_validate(row, from_attributes=True) for row in memory.feedback.select(trajectory_id)
        ],
    )


@router.post(
    "/{trajectory_id}/close",
    summary="Close a trajectory that waits for its client",
    responses=error_responses(NotFound, Conflict),
)
async def close_trajectory(trajectory_id: str, server: Server, caller: RequestCaller) -> TrajectorySummary:
    """For a client that runs tools itself and will not continue after the last one. Without this, the trajectory closes
    after the client has been away for some time. A closed trajectory is returned unchanged."""
    memory = server.memory
    trajectory = memory.trajectories.get(trajectory_of(trajectory_id), tenant=caller.tenant)
    if trajectory.stage is TrajectoryStage.RUNNING:
        waiting = memory.trajectories.waiting(episode_id=trajectory.episode_id, tenant=caller.tenant)
        # RUNNING also covers a turn that is being played; closing it would lose its last steps.
        if trajectory.id not in {each.id for each in waiting}:
            raise Conflict(f"trajectory {trajectory.id!r} is being played: it closes by itself", code="episode_busy")
        # No `await` between the look-up and the lock that this takes.
        trajectory = await server.agent.open_episodes.close(trajectory, None)
    return describe_trajectory(memory.trajectories.with_reward(trajectory))


def describe_trajectory(view: TrajectoryWithReward) -> TrajectorySummary:
    trajectory: Trajectory = view.trajectory
    return TrajectorySummary(
        **{name: getattr(trajectory, name) for name in COPIED_FIELDS},
        policy=f"v{trajectory.policy}",
        question=trajectory.task_text[:QUESTION_CHARS],
        reward=view.reward,
        success=view.is_success,
        used_memory=bool(trajectory.memory_text),
    )


def _describe_step(step: Step, with_token_ids: bool) -> StepDetail:
    detail = StepDetail(
        **{name: getattr(step, name) for name in StepDetail.model_fields.keys() & Step.model_fields.keys()},
        num_prompt_tokens=len(step.prompt_token_ids or ()),
        num_output_tokens=len(step.output_token_ids or ()),
    )
    # Excluded by default: they are most of the answer's size.
    if not with_token_ids:
        detail.prompt_token_ids = detail.output_token_ids = None
    return detail
