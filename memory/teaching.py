"""Who may teach the weights. They serve every tenant, so feedback counts for them by permission only.

Feedback teaches when it was given with a key that has the scope `teach`, or in the default tenant with an
administrator's key or without any key (by whoever sits at the server's machine, and in rows older than keys).
An environment's reward is measured, not claimed: it teaches in the default tenant, and elsewhere where the episode
was asked for with a key that teaches. Revoking a key takes nothing back, because keys are mostly replaced.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, or_
from sqlmodel import Session, col, select

from memory.schema import ApiKey, Feedback, Reward, RewardSource, Scope, Trajectory

DEFAULT_TENANT = ""


@dataclass(frozen=True)
class Teacher:
    """Whose judgement something is learned by."""

    tenant: str = DEFAULT_TENANT
    key_id: str | None = None
    user_id: str = ""
    is_environment: bool = False
    """An environment measured it: nobody claimed it."""


OPERATOR = Teacher()
"""Whoever sits at the server's machine."""


def teaches(key: ApiKey) -> bool:
    """Return whether feedback with this key counts for the weights."""
    return Scope.TEACH in key.scopes or (Scope.ADMIN in key.scopes and key.tenant == DEFAULT_TENANT)


def teaching_keys(session: Session) -> list[str]:
    """Return the ids of the keys whose feedback counts for the weights, revoked ones too."""
    return [key.id for key in session.exec(select(ApiKey)) if teaches(key)]


def reward_teaches(keys: Collection[str]) -> ColumnElement[bool]:
    """Return the condition under which a reward, of the trajectory that encloses it, counts for the weights."""
    is_measured = Reward.source == RewardSource.ENVIRONMENT
    was_played_for_us = or_(Trajectory.tenant == DEFAULT_TENANT, col(Trajectory.key_id).in_(keys))
    was_said_to_us = _was_given_to_us(Reward, keys)
    return or_(and_(is_measured, was_played_for_us), and_(~is_measured, was_said_to_us))


def correction_teaches(keys: Collection[str]) -> ColumnElement[bool]:
    """Return the condition under which feedback, joined with its trajectory, counts for the weights."""
    return _was_given_to_us(Feedback, keys)


def _was_given_to_us(row: type[Reward] | type[Feedback], keys: Collection[str]) -> ColumnElement[bool]:
    is_operators = and_(col(row.key_id).is_(None), Trajectory.tenant == DEFAULT_TENANT)
    return or_(is_operators, col(row.key_id).in_(keys))
