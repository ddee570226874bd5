"""Chooses the correction with which a corrected episode is shown as an exemplar, if it may be shown at all.

A corrected answer is wrong, whatever its reward, so it is never shown as solved. The newest correction of the last
reply replaces it. An episode with a correction of an earlier reply is not shown, because the later steps build on the
wrong reply.

Invariants: the words of one person are shown to nobody else; words that a whole tenant is shown come from a teacher, or
an operator approved them after they were written.
"""

from __future__ import annotations

from sqlmodel import Session, col, select

from memory.records.feedback import position_of_reply
from memory.records.trajectory_queries import IS_REPLY
from memory.schema import Feedback, Step, Trajectory
from memory.scopes import EVERYBODY, Scopes
from memory.teaching import feedback_teaches, teaching_keys


def find_corrections(session: Session, trajectory_id: str) -> list[Feedback]:
    """Return the corrections of a trajectory, newest first."""
    query = select(Feedback).where(Feedback.trajectory_id == trajectory_id, col(Feedback.correction).is_not(None))
    return list(session.exec(query.order_by(col(Feedback.sequence).desc(), col(Feedback.id).desc())))


def is_approved_since(trajectory: Trajectory, correction: Feedback) -> bool:
    """Return whether an operator approved the exemplar after the correction was given."""
    return trajectory.approved_at is not None and trajectory.approved_at >= correction.created_at


def choose_correction(
    session: Session, trajectory: Trajectory, corrections: list[Feedback], scopes: Scopes
) -> Feedback | None:
    """Return the correction to show in place of the last reply; None when the episode must not be shown."""
    replies = select(Step.position).where(Step.trajectory_id == trajectory.id, IS_REPLY)
    last_reply = session.scalar(replies.order_by(col(Step.position).desc()).limit(1))
    if last_reply is None or any(position_of_reply(session, each) != last_reply for each in corrections):
        return None
    newest = corrections[0]
    if is_approved_since(trajectory, newest):
        return newest
    if trajectory.approved_at is not None:  # the approval was for other words
        return None
    if newest.user_id not in ("", trajectory.user_id):
        return None
    is_narrow = scopes.of_trajectory(trajectory) != EVERYBODY
    return newest if is_narrow or _may_teach(session, newest) else None


def _may_teach(session: Session, correction: Feedback) -> bool:
    query = select(Feedback.id).join(Trajectory, col(Trajectory.id) == Feedback.trajectory_id)
    query = query.where(Feedback.tenant == correction.tenant, Feedback.id == correction.id)
    return session.exec(query.where(feedback_teaches(teaching_keys(session)))).first() is not None
