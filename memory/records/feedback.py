"""What people and programs say of an episode, kept as it was posted; a number among it becomes a reward.

This module refuses to know how a correction is learned from; it tells which reply each of them speaks of.
Invariants: one id of one tenant, one body: posting it again changes nothing; feedback and its trajectory are of one
tenant; what is said of one step rewards nothing, because it says nothing of the rest.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert
from sqlmodel import Session, col, select

from memory.errors import FeedbackConflict, UnknownStep, UnknownTrajectory
from memory.records.trajectories import Trajectories, check_reward
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
from memory.storage.database import Database
from memory.teaching import OPERATOR, Teacher, correction_teaches, teaching_keys

# Not `trajectory_id`: an episode may have another newest trajectory by the time a retry comes.
BODY = ("target", "step", "name", "value", "comment", "correction", "source", "tags")
SOURCES = {"code": RewardSource.CODE, "judge": RewardSource.JUDGE}
"""Posters that are no people, and how much they are trusted; any other name is a user's."""


@dataclass(frozen=True)
class Correction:
    """What a reply should have been: the reply as it was recorded, and the better words."""

    trajectory: Trajectory
    step: Step
    text: str
    teacher: Teacher = OPERATOR
    """Who wrote them."""


class FeedbackRecords:
    """All feedback ever posted."""

    def __init__(self, database: Database, trajectories: Trajectories) -> None:
        self._database = database
        self._trajectories = trajectories
        self.num_posted: Counter[str] = Counter()
        """Since the start, by kind: bool, number, text, comment, correction. One piece may be of several kinds."""

    async def post(self, feedback: Feedback) -> tuple[Feedback, bool]:
        """Keep the feedback; return it, and whether it is new. A bool or a number also becomes a reward. Where it names
        nobody, it is taken to come from the person whose episode it is about.

        Raises: UnknownTrajectory; UnknownStep; FeedbackConflict for a known id with another body; ValueError for a
        number outside [0, 1], and for a correction of a step that is no reply.
        """
        values = feedback.model_dump()
        values["id"] = values.get("id") or new_id("fb")
        values["target"] = values["target"] or values["trajectory_id"]
        is_number = isinstance(values["value"], bool | int | float)
        if is_number:
            check_reward(values["value"])

        def write(session: Session) -> tuple[Feedback, bool]:
            place = (values["tenant"], values["id"])
            known = session.get(Feedback, place)
            if known is not None:
                return _same(known, values), False
            target = _require_target(session, values)
            values["user_id"] = values["user_id"] or target.user_id
            session.execute(insert(Feedback).values(**values))
            if is_number and values["step"] is None:
                reason = ": ".join(part for part in (values["name"], values["comment"]) if part)
                source = SOURCES.get(values["source"], RewardSource.USER)
                reward = float(values["value"])
                given_by = {"key_id": values["key_id"], "user_id": values["user_id"]}
                self._trajectories.add_reward(session, values["trajectory_id"], reward, source, reason, **given_by)
            if values["correction"] is not None:
                self._trajectories.note_exemplar(session, target)
            return session.get_one(Feedback, place), True

        kept, is_new = await self._database.write(write)
        if is_new:
            self.num_posted.update(_kinds(values))
        return kept, is_new

    def select(self, trajectory_id: str) -> list[Feedback]:
        """Return what was said of one trajectory, oldest first."""
        with self._database.read() as session:
            query = select(Feedback).where(Feedback.trajectory_id == trajectory_id)
            return list(session.exec(query.order_by(col(Feedback.sequence), col(Feedback.id))))

    def comments(self, *, since_id: str = "") -> dict[str, list[str]]:
        """Return what was written about episodes in words, oldest first, by trajectory; of older ones than `since_id`
        nothing."""
        query = (
            select(Feedback.trajectory_id, Feedback.comment)
            .where(col(Feedback.comment).is_not(None), col(Feedback.trajectory_id) >= since_id)
            .order_by(col(Feedback.sequence), col(Feedback.id))
        )
        found: dict[str, list[str]] = defaultdict(list)
        with self._database.read() as session:
            for trajectory_id, comment in session.exec(query):
                if comment and comment.strip():
                    found[trajectory_id].append(comment)
        return dict(found)

    def corrections(
        self, *, limit: int, environments: Collection[str] | None = None, is_for_weights: bool = False
    ) -> list[Correction]:
        """Return the newest corrections from which one may learn, oldest first: the last word on each reply, of
        episodes that are over and not held out. With `environments`, only of those; `""` stands for live traffic. With
        `is_for_weights`, only words of those who may teach the weights (memory/teaching.py). Reads steps: for a thread
        when there may be many.
        """
        query = _join_corrected(select(Feedback, Trajectory))
        if environments is not None:
            query = query.where(func.coalesce(Trajectory.environment, "").in_(environments))
        query = query.order_by(col(Feedback.sequence).desc(), col(Feedback.id).desc()).limit(limit)
        found: dict[tuple[str, int], Correction] = {}
        with self._database.read() as session:
            if is_for_weights:
                query = query.where(correction_teaches(teaching_keys(session)))
            for feedback, trajectory in session.exec(query).all():
                place = position_of_reply(session, feedback)
                if place is not None and (trajectory.id, place) not in found:
                    step = session.get_one(Step, (trajectory.id, place))
                    teacher = Teacher(trajectory.tenant, feedback.key_id, feedback.user_id)
                    found[trajectory.id, place] = Correction(trajectory, step, feedback.correction or "", teacher)
        return list(found.values())[::-1]

    def count_corrections_without_teacher(self) -> int:
        """Return how many corrections were given by those who may not teach the weights."""
        with self._database.read() as session:
            query = _join_corrected(select(func.count()).select_from(Feedback))
            return session.scalar(query.where(~correction_teaches(teaching_keys(session)))) or 0


def _join_corrected(query: Any) -> Any:
    """Narrow a query of feedback down to corrections from which one may learn, joined with their trajectories."""
    return query.join(Trajectory, col(Trajectory.id) == Feedback.trajectory_id).where(
        col(Feedback.correction).is_not(None),
        Trajectory.stage != TrajectoryStage.RUNNING,
        Trajectory.split != Split.HELD_OUT,
    )


def _require_target(session: Session, values: dict[str, Any]) -> Trajectory:
    trajectory_id, position = values["trajectory_id"], values["step"]
    target = session.get(Trajectory, trajectory_id)
    if target is None or target.tenant != values["tenant"]:
        raise UnknownTrajectory(f"no trajectory has the id {trajectory_id!r}: feedback needs its target")
    if position is None:
        return target
    query = select(Step.kind).where(Step.trajectory_id == trajectory_id, Step.position == position)
    kind = session.scalar(query)
    if kind is None:
        raise UnknownStep(f"trajectory {trajectory_id!r} has no step {position!r}: read it to see which there are")
    if values["correction"] is not None and kind is not StepKind.MODEL:
        raise ValueError(f"step {position!r} of {trajectory_id!r} is a {kind.value}'s: correct a reply of the model")
    return target


def position_of_reply(session: Session, feedback: Feedback) -> int | None:
    """Return the position of the reply that is meant: the step named, or what the answer named ended with."""
    if feedback.step is not None:
        return feedback.step
    replies = session.execute(
        select(Step.position, Step.handover_digest)
        .where(
            Step.trajectory_id == feedback.trajectory_id,
            Step.kind == StepKind.MODEL,
            col(Step.position) >= (feedback.answer_start or 0),
        )
        .order_by(col(Step.position))
    ).all()
    if feedback.answer_start is not None:  # an answer ends where it hands over to the client
        replies = next(([reply] for reply in replies if reply.handover_digest is not None), replies)
    return replies[-1].position if replies else None


def _kinds(values: dict[str, Any]) -> list[str]:
    kinds = [kind for kind in ("comment", "correction") if values[kind] is not None]
    if values["value"] is not None:
        kinds.append({bool: "bool", str: "text"}.get(type(values["value"]), "number"))
    return kinds


def _same(known: Feedback, values: dict[str, Any]) -> Feedback:
    """Return the feedback that is known if its body is the same, as JSON has it: `true` and `1` differ."""
    different = sorted(name for name in BODY if _as_kept(getattr(known, name)) != _as_kept(values[name]))
    if different:
        raise FeedbackConflict(
            f"feedback {known.id!r} was posted before with another {', '.join(different)}: give this one a new id"
        )
    return known


def _as_kept(value: Any) -> str:
    """Return what tells two values apart once both are kept: what no text can hold was mended in the row."""
    return dump_json(clean(value) if isinstance(value, str) else value)
