"""Feedback of people and programs on trajectories, stored as it was posted; a number in it becomes a reward.

Invariants: an id has one body within a tenant, and posting it again changes nothing; feedback and its trajectory belong
to the same tenant; feedback on a single step gives no reward, because it does not judge the rest.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, insert, or_
from sqlalchemy import select as sql_select
from sqlalchemy.orm import load_only
from sqlmodel import Session, col, select

from memory.errors import FeedbackConflict, UnknownStep, UnknownTrajectory
from memory.records.trajectories import Trajectories, check_reward
from memory.records.trajectory_queries import IS_REPLY
from memory.schema import (
    Feedback,
    RewardSource,
    Split,
    Step,
    StepKind,
    Trajectory,
    TrajectoryStage,
    clean,
    dump_json,
    new_id,
)
from memory.scopes import EVERYBODY
from memory.storage.database import Database
from memory.teaching import OPERATOR, Teacher, feedback_teaches, teaching_keys
from memory.team import is_actors

# Not `trajectory_id`: a retry may resolve the same episode to a newer trajectory.
BODY = ("target", "step", "name", "value", "comment", "correction", "source", "tags")
SOURCES = {"code": RewardSource.CODE, "judge": RewardSource.JUDGE}
"""Reward sources of programs, by the source that they name; any other name is a user."""


@dataclass(frozen=True)
class Correction:
    """A recorded reply with the text that it should have been. The optimizer learns from it."""

    trajectory: Trajectory
    step: Step
    text: str
    teacher: Teacher = OPERATOR
    """The author of the text."""


class FeedbackRecords:
    """All feedback."""

    def __init__(self, database: Database, trajectories: Trajectories) -> None:
        self._database = database
        self._trajectories = trajectories
        self.num_posted: Counter[str] = Counter()
        """Number of posts since the start by kind: bool, number, text, comment, correction. A post may have several."""

    async def post(self, feedback: Feedback) -> tuple[Feedback, bool]:
        """Store feedback; return (its row, whether it is new). A bool or a number also becomes a reward of
        the whole episode, whatever its name, unless it is of one step.

        Feedback without a person counts as given by the person of the trajectory. Raises: UnknownTrajectory;
        UnknownStep; FeedbackConflict for a known id with another body; ValueError for a number outside [0, 1], and for
        a correction of a step that is no reply.
        """
        values = feedback.model_dump()
        values["id"] = values.get("id") or new_id("fb")
        values["target"] = values["target"] or values["trajectory_id"]
        is_number = isinstance(values["value"], bool | int | float)
        if is_number:
            check_reward(values["value"])

        def write(session: Session) -> tuple[Feedback, bool]:
            key = (values["tenant"], values["id"])
            known = session.get(Feedback, key)
            if known is not None:
                _require_same(known, values)
                return known, False
            target = _require_target(session, values)
            values["user_id"] = values["user_id"] or target.user_id
            session.execute(insert(Feedback).values(**values))
            # in the same transaction: a retry finds the feedback and adds no second reward
            if is_number and values["step"] is None:  # a single step says nothing of the whole
                reason = ": ".join(part for part in (values["name"], values["comment"]) if part)
                source = SOURCES.get(values["source"], RewardSource.USER)
                reward = float(values["value"])
                given_by = {"key_id": values["key_id"], "user_id": values["user_id"]}
                self._trajectories.add_reward(session, values["trajectory_id"], reward, source, reason, **given_by)
            if values["correction"] is not None:
                self._trajectories.note_exemplar(session, target)
            return session.get_one(Feedback, key), True

        row, is_new = await self._database.write(write)
        if is_new:
            self.num_posted.update(_kinds(values))
        return row, is_new

    def select(self, trajectory_id: str) -> list[Feedback]:
        """Return the feedback on one trajectory, oldest first."""
        with self._database.read() as session:
            query = select(Feedback).where(Feedback.trajectory_id == trajectory_id)
            return list(session.exec(query.order_by(col(Feedback.sequence), col(Feedback.id))))

    def comments(self, *, since_id: str = "") -> dict[str, list[str]]:
        """Return the comments by trajectory, oldest first, without trajectories older than `since_id`.

        Only those that may become a memory with the scope of their episode: comments of its own person, and by a
        teacher where the whole tenant is shown it.
        """
        scope = self._trajectories.scopes.of_episode()
        query = (
            select(Feedback.trajectory_id, Feedback.comment)
            .join(Trajectory, col(Trajectory.id) == Feedback.trajectory_id)
            .where(
                col(Feedback.comment).is_not(None),
                col(Feedback.trajectory_id) >= since_id,
                col(Feedback.user_id).in_(("", Trajectory.user_id)),
            )
            .order_by(col(Feedback.sequence), col(Feedback.id))
        )
        comments: dict[str, list[str]] = defaultdict(list)
        with self._database.read() as session:
            may_teach = feedback_teaches(teaching_keys(session))
            for trajectory_id, comment in session.exec(query.where(or_(scope != EVERYBODY, may_teach))):
                if comment and comment.strip():
                    comments[trajectory_id].append(comment)
        return dict(comments)

    def corrections(
        self, *, limit: int, environments: Collection[str] | None = None, is_for_weights: bool = False
    ) -> list[Correction]:
        """Return the newest learnable corrections, oldest first: the last one of each reply.

        Their trajectories are closed and not held out. `environments` narrows them down; `""` among them stands for
        live traffic. With `is_for_weights`, only corrections that may teach the weights count (memory/teaching.py).
        Reads steps: call it in a thread when there may be many.
        """
        query = _learnable(sql_select(Feedback, Trajectory))
        if environments is not None:
            query = query.where(func.coalesce(Trajectory.environment, "").in_(environments))
        # of feedback, not of replies: fewer corrections may come back
        query = query.order_by(col(Feedback.sequence).desc(), col(Feedback.id).desc()).limit(limit)
        corrections: dict[tuple[str, int], Correction] = {}
        with self._database.read() as session:
            if is_for_weights:
                # SQLAlchemy adds the condition to the same SELECT, ahead of its limit
                query = query.where(feedback_teaches(teaching_keys(session)))
            for feedback, trajectory in session.execute(query).all():
                position = position_of_reply(session, feedback)
                if position is not None and (trajectory.id, position) not in corrections:
                    step = session.get_one(Step, (trajectory.id, position))
                    teacher = Teacher(trajectory.tenant, feedback.key_id, feedback.user_id)
                    text = feedback.correction or ""
                    corrections[trajectory.id, position] = Correction(trajectory, step, text, teacher)
        # Read newest first, so that the last correction of each reply is the one kept.
        return list(corrections.values())[::-1]

    def count_corrections_without_teacher(self) -> int:
        """Return the number of corrections that may not teach the weights."""
        with self._database.read() as session:
            query = _learnable(sql_select(func.count()).select_from(Feedback))
            return session.scalar(query.where(~feedback_teaches(teaching_keys(session)))) or 0


def _learnable(query: Select) -> Select:
    """Join a query of feedback with trajectories, and narrow it to learnable corrections."""
    return query.join(Trajectory, col(Trajectory.id) == Feedback.trajectory_id).where(
        col(Feedback.correction).is_not(None),
        col(Trajectory.stage) != TrajectoryStage.RUNNING,
        col(Trajectory.split) != Split.HELD_OUT,
    )


def _require_target(session: Session, values: dict[str, Any]) -> Trajectory:
    trajectory_id, position = values["trajectory_id"], values["step"]
    target = session.get(Trajectory, trajectory_id)
    if target is None or target.tenant != values["tenant"]:
        raise UnknownTrajectory(f"no trajectory has the id {trajectory_id!r}: give feedback an existing target")
    if position is None:
        return target
    # the whole step holds all its token ids
    columns = load_only(Step.kind, Step.role)  # pyright: ignore[reportArgumentType] (columns, outside of an instance)
    step = session.get(Step, (trajectory_id, position), options=[columns])
    if step is None:
        raise UnknownStep(f"trajectory {trajectory_id!r} has no step {position!r}: read it to see which there are")
    if values["correction"] is not None and (step.kind is not StepKind.MODEL or not is_actors(step)):
        writer = step.role or step.kind
        raise ValueError(f"step {position!r} of {trajectory_id!r} is a {writer.value}'s: correct a reply of the model")
    return target


def position_of_reply(session: Session, feedback: Feedback) -> int | None:
    """Return the position of the reply that feedback is about: the named step, or the last reply of the answer."""
    if feedback.step is not None:
        return feedback.step
    replies = session.execute(
        select(Step.position, Step.handover_digest)
        .where(
            Step.trajectory_id == feedback.trajectory_id,
            IS_REPLY,
            col(Step.position) >= (feedback.answer_start or 0),
        )
        .order_by(col(Step.position))
    ).all()
    if feedback.answer_start is not None:  # an answer ends with the reply that hands tool calls to the client
        replies = next(([reply] for reply in replies if reply.handover_digest is not None), replies)
    return replies[-1].position if replies else None


def _kinds(values: dict[str, Any]) -> list[str]:
    kinds = [kind for kind in ("comment", "correction") if values[kind] is not None]
    if values["value"] is not None:
        kinds.append({bool: "bool", str: "text"}.get(type(values["value"]), "number"))
    return kinds


def _require_same(known: Feedback, values: dict[str, Any]) -> None:
    """Raises: FeedbackConflict unless the stored body is equal as JSON, where `true` and `1` differ."""
    different = sorted(name for name in BODY if _as_stored(getattr(known, name)) != _as_stored(values[name]))
    if different:
        raise FeedbackConflict(
            f"feedback {known.id!r} was posted before with another {', '.join(different)}: give this one a new id"
        )


def _as_stored(value: object) -> str:
    """Return a value as JSON, with the replacements that a text column makes."""
    return dump_json(clean(value) if isinstance(value, str) else value)
