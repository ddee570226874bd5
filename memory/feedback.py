"""What people and programs say of an episode, kept as it was posted; a number among it becomes a reward.

This module refuses to know what a correction teaches. Invariants: one id of one tenant, one body: posting it again
changes nothing; feedback and its trajectory are of one tenant.
"""

from __future__ import annotations

import builtins

from sqlalchemy import insert
from sqlmodel import Session, col, select

from memory.database import Database
from memory.errors import FeedbackConflict, UnknownTrajectory
from memory.schema import Feedback, RewardSource, Trajectory, new_id
from memory.trajectories import Trajectories, check_reward

BODY = frozenset({"trajectory_id", "name", "value", "comment", "correction", "source", "tags"})


class FeedbackBook:
    """All feedback ever posted."""

    def __init__(self, database: Database, trajectories: Trajectories) -> None:
        self._database = database
        self._trajectories = trajectories

    async def post(self, feedback: Feedback) -> tuple[Feedback, bool]:
        """Keep the feedback; return it, and whether it is new. A bool or a number also becomes a user's reward.

        Raises: UnknownTrajectory; FeedbackConflict for a known id with another body; ValueError for a number
        outside [0, 1].
        """
        values = feedback.model_dump()
        values["id"] = values.get("id") or new_id("fb")
        is_reward = isinstance(values["value"], bool | int | float)
        if is_reward:
            check_reward(values["value"])

        def write(session: Session) -> tuple[Feedback, bool]:
            place = (values["tenant"], values["id"])
            known = session.get(Feedback, place)
            if known is not None:
                return _same(known, values), False
            target = session.get(Trajectory, values["trajectory_id"])
            if target is None or target.tenant != values["tenant"]:
                raise UnknownTrajectory(
                    f"no trajectory has the id {values['trajectory_id']!r}: feedback needs its target"
                )
            session.execute(insert(Feedback).values(**values))
            if is_reward:
                reason = ": ".join(part for part in (values["name"], values["comment"]) if part)
                reward = float(values["value"])
                self._trajectories.add_reward(session, values["trajectory_id"], reward, RewardSource.USER, reason)
            return session.get_one(Feedback, place), True

        return await self._database.write(write)

    def list(self, trajectory_id: str) -> builtins.list[Feedback]:
        """Return what was said of one trajectory, oldest first."""
        with self._database.read() as session:
            query = select(Feedback).where(Feedback.trajectory_id == trajectory_id)
            return builtins.list(session.exec(query.order_by(col(Feedback.created_at), col(Feedback.id))))


def _same(known: Feedback, values: dict) -> Feedback:
    """Return the feedback that is known if its body is the same."""
    different = sorted(name for name in BODY if getattr(known, name) != values[name])
    if different:
        raise FeedbackConflict(
            f"feedback {known.id!r} was posted before with another {', '.join(different)}: give this one a new id"
        )
    return known
