"""Decides which feedback may teach the weights. The weights serve every tenant, so teaching needs a permission.

Feedback teaches when its key has the scope `teach`; in the default tenant also with an administrator's key, or without
a key (the operator at the server's machine, and rows older than keys). An environment's reward is measured, so it
teaches in the default tenant, and elsewhere when the episode was requested with a teaching key. Imported examples teach
as feedback of the key that imported them. Revoking a key takes nothing back, because keys are mostly replaced.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, or_
from sqlmodel import Session, col, select

from memory.schema import ApiKey, Example, Feedback, Reward, RewardSource, Scope, Trajectory

DEFAULT_TENANT = ""


class TeacherKind(StrEnum):
    """The kinds of contributions that a teacher makes."""

    FEEDBACK = "feedback"
    ENVIRONMENT = "environment"
    """A reward that an environment measured."""
    IMPORT = "import"
    """Examples that were imported."""
    VERIFIER = "verifier"
    """The grade of a model that was trained on rewards."""


@dataclass(frozen=True)
class Teacher:
    """The source of a reward or a correction."""

    tenant: str = DEFAULT_TENANT
    key_id: str | None = None
    user_id: str = ""
    kind: TeacherKind = TeacherKind.FEEDBACK


OPERATOR = Teacher()
"""The operator at the server's machine."""


def teaches(key: ApiKey) -> bool:
    """Return whether feedback with this key may teach the weights."""
    return Scope.TEACH in key.scopes or (Scope.ADMIN in key.scopes and key.tenant == DEFAULT_TENANT)


def teaching_keys(session: Session) -> list[str]:
    """Return the ids of all teaching keys, including revoked ones."""
    return [key.id for key in session.exec(select(ApiKey)) if teaches(key)]


def reward_teaches(keys: Collection[str]) -> ColumnElement[bool]:
    """Return the condition under which a reward of the enclosing query's trajectory may teach the weights."""
    is_measured = col(Reward.source) == RewardSource.ENVIRONMENT
    episode_teaches = or_(col(Trajectory.tenant) == DEFAULT_TENANT, col(Trajectory.key_id).in_(keys))
    return or_(and_(is_measured, episode_teaches), and_(~is_measured, _giver_teaches(Reward, keys)))


def feedback_teaches(keys: Collection[str]) -> ColumnElement[bool]:
    """Return the condition under which feedback, joined with its trajectory, may teach the weights."""
    return _giver_teaches(Feedback, keys)


def example_teaches(keys: Collection[str]) -> ColumnElement[bool]:
    """Return the condition under which an imported example may teach the weights."""
    is_operators = and_(col(Example.key_id).is_(None), col(Example.tenant) == DEFAULT_TENANT)
    return or_(is_operators, and_(col(Example.key_id).is_not(None), col(Example.key_id).in_(keys)))


def _giver_teaches(row: type[Reward] | type[Feedback], keys: Collection[str]) -> ColumnElement[bool]:
    is_operators = and_(col(row.key_id).is_(None), col(Trajectory.tenant) == DEFAULT_TENANT)
    # a row of another tenant without a key gives NULL, not false, and its negation NULL as well: it is counted on
    # neither side
    return or_(is_operators, col(row.key_id).in_(keys))
