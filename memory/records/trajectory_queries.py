"""SQL behind `memory.records.trajectories`: the reward that counts, waiting and learnable episodes, new steps.

Statements of the hot path are built once, at import: building one takes longer than SQLite needs to run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Insert,
    ScalarSelect,
    Select,
    SQLColumnExpression,
    Text,
    and_,
    bindparam,
    case,
    cast,
    exists,
    func,
    insert,
    or_,
    select,
)
from sqlalchemy.orm import aliased
from sqlmodel import SQLModel, col

from memory.schema import Feedback, Reward, RewardSource, Split, Step, StepKind, Trajectory, TrajectoryStage
from memory.team import Role

REWARD_TRUST = (
    RewardSource.USER,
    RewardSource.CODE,
    RewardSource.ENVIRONMENT,
    RewardSource.JUDGE,
)  # most trusted first
TRAINING_TRUST = (*REWARD_TRUST, RewardSource.VERIFIER)
"""The same for rows of training data. A verifier learned from the other rewards, so nothing may be proved, shown or
reported by its grades: only a query that asks for this order sees them."""


def effective_reward_of(
    trajectory_id: SQLColumnExpression[str],
    column: str = "value",
    conditions: Sequence[ColumnElement[bool]] = (),
    sources: Sequence[RewardSource] = REWARD_TRUST,
) -> ScalarSelect[Any]:
    """Return the subquery for a column of the reward that counts: the newest of the most trusted source.

    Only rewards of the `sources`, the most trusted first, that meet the `conditions` are considered. The subquery runs
    once for each row of the result, so a page of trajectories costs a page of look-ups.
    """
    rank = case({source: position for position, source in enumerate(sources)}, value=col(Reward.source))
    # not IN: storage/sql.py compiles a statement once, and the list of an IN is expanded at each execution
    is_counted = or_(*(col(Reward.source) == source for source in sources))
    return (
        select(getattr(Reward, column))
        .where(col(Reward.trajectory_id) == trajectory_id, is_counted, *conditions)
        .order_by(rank, col(Reward.id).desc())
        .limit(1)
        .correlate(Trajectory)  # only: the enclosing query may select rewards of its own
        .scalar_subquery()
    )


def learnable_conditions(
    reward_conditions: Sequence[ColumnElement[bool]],
    sources: Sequence[RewardSource],
    *,
    with_branches: bool = False,
) -> list[ColumnElement[bool]]:
    """Return the conditions that join each learnable trajectory with the reward that counts for it."""
    return [
        *([] if with_branches else [col(Trajectory.branch_of).is_(None)]),
        col(Trajectory.stage) == TrajectoryStage.FINISHED,
        col(Trajectory.split) != Split.HELD_OUT,
        col(Reward.trajectory_id) == Trajectory.id,
        col(Reward.id) == effective_reward_of(col(Trajectory.id), "id", reward_conditions, sources),
    ]


def last_handover(digest: str | None = None, before: datetime | None = None) -> Select[str]:
    """Return the query for ids of trajectories whose last model call handed tool calls over to the client.

    With `digest`, only handovers with this digest; with `before`, only older ones.
    """
    later = aliased(Step)
    is_answered = exists().where(
        col(later.trajectory_id) == Step.trajectory_id,
        col(later.position) > Step.position,
        col(later.kind) == StepKind.MODEL,
    )
    query = select(col(Step.trajectory_id)).where(col(Step.handover_digest).is_not(None), ~is_answered)
    if digest is not None:
        query = query.where(col(Step.handover_digest) == digest)
    if before is not None:
        query = query.where(col(Step.created_at) < before)
    return query


def next_position(trajectory_id: SQLColumnExpression[str]) -> ScalarSelect[int]:
    """Return the subquery for the position of a trajectory's next step."""
    last = func.coalesce(func.max(col(Step.position)), -1)
    return select(last + 1).where(col(Step.trajectory_id) == trajectory_id).scalar_subquery()


def _build_step_insert() -> Insert:
    """Return a guarded INSERT: it adds a row only while the trajectory runs and the position is the next one."""
    columns = SQLModel.metadata.tables["steps"].columns
    trajectory_id = bindparam("trajectory_id", type_=columns["trajectory_id"].type)
    # Checked in the statement itself, so that no other write comes between the check and the insert.
    is_running = exists().where(col(Trajectory.id) == trajectory_id, col(Trajectory.stage) == TrajectoryStage.RUNNING)
    is_next = bindparam("position", type_=columns["position"].type) == next_position(trajectory_id)
    values = select(*(bindparam(column.name, type_=column.type) for column in columns)).where(is_running, is_next)
    statement = insert(Step).from_select([column.name for column in columns], values)
    return statement.execution_options(preserve_rowcount=True)  # psycopg drops the row count otherwise


IS_REPLY = and_(col(Step.kind) == StepKind.MODEL, or_(col(Step.role).is_(None), col(Step.role) == Role.ACTOR))
"""A model call that wrote to the client or called tools; a team's plan and checks did not."""
_HAS_CORRECTION = exists().where(col(Feedback.correction).is_not(None))
IS_CORRECTED = _HAS_CORRECTION.where(col(Feedback.trajectory_id) == Trajectory.id).correlate(Trajectory)
IS_ONE_CORRECTED = select(_HAS_CORRECTION.where(col(Feedback.trajectory_id) == bindparam("trajectory_id")))
INSERT_TRAJECTORY = insert(Trajectory).execution_options(preserve_rowcount=True)
INSERT_STEP = _build_step_insert()
EFFECTIVE_REWARD = select(effective_reward_of(bindparam("trajectory_id")))
# Token ids are stored as bytes: the lengths are bytes, four for each token.
SIZE = select(
    func.count(),
    func.coalesce(func.sum(case((col(Step.kind) == StepKind.MODEL, 1), else_=0)), 0),
    func.coalesce(func.sum(func.length(col(Step.prompt_token_ids))), 0),
    func.coalesce(func.sum(func.length(col(Step.output_token_ids))), 0),
).where(col(Step.trajectory_id) == bindparam("trajectory_id"), col(Step.position) >= bindparam("since"))
MODEL_CALLS = select(
    func.count(),
    # as text: the two dialects have no function for it that both take
    func.coalesce(func.sum(case((cast(col(Step.tool_calls), Text) != "[]", 1), else_=0)), 0),
).where(col(Step.trajectory_id) == bindparam("trajectory_id"), col(Step.kind) == StepKind.MODEL)
