"""The scope of a memory: the whole tenant, one person, or nobody.

A scope is a person's `user_id`, `EVERYBODY` for the whole tenant, or None (NULL in SQL) for nobody. Practice in an
environment belongs to the tenant. An episode of live traffic belongs to its person, unless its client shares it, an
operator approved it, or `memory.share_live` is "tenant".

Invariant: this module alone implements the rule, and each row is checked with it whenever it is shown. The index stores
scopes only to find rows faster, and may be behind.
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import ColumnElement, SQLColumnExpression, bindparam, case, func, literal, or_
from sqlmodel import col

from memory.schema import Insight, Trajectory

EVERYBODY = ""
"""The scope of rows that the whole tenant is shown."""


class Scopes:
    """The rule for one value of `memory.share_live`."""

    def __init__(self, share_live: Literal["user", "tenant"] = "user") -> None:
        self.shares_live = share_live == "tenant"

    def of_exemplar(self) -> ColumnElement[str | None]:
        """Return the scope of a trajectory as an exemplar."""
        return self._scope_of(
            col(Trajectory.user_id),
            col(Trajectory.environment).is_not(None),
            col(Trajectory.is_shared),
            col(Trajectory.approved_at).is_not(None),
        )

    def of_insight(self) -> ColumnElement[str | None]:
        """Return the scope of an insight.

        One of live traffic without a person has the scope of nobody: it precedes the recording of persons, or another
        setting, so the person that it is about is unknown.
        """
        return self._scope_of(
            col(Insight.user_id),
            col(Insight.environment) != "",
            col(Insight.is_shared),
            col(Insight.approved_at).is_not(None),
        )

    def of_episode(self) -> ColumnElement[str | None]:
        """Return the scope of the recorded text of an episode; nobody for one that an operator retired.

        An approval does not widen it: it applies to the exemplar, which the operator may have reworded.
        """
        scope = self._scope_of(
            col(Trajectory.user_id), col(Trajectory.environment).is_not(None), col(Trajectory.is_shared)
        )
        return case((col(Trajectory.retired_at).is_(None), scope), else_=None)

    def of_trajectory(self, trajectory: Trajectory) -> str | None:
        """Return the scope of `of_episode` for one trajectory."""
        if trajectory.retired_at is not None:
            return None
        if trajectory.environment is not None or trajectory.is_shared or self.shares_live:
            return EVERYBODY
        return trajectory.user_id or None

    def _scope_of(
        self, user_id: SQLColumnExpression[str], *widened: SQLColumnExpression[bool]
    ) -> ColumnElement[str | None]:
        if self.shares_live:
            return literal(EVERYBODY)
        # nullif: EVERYBODY is the empty text, so without it an episode of nobody would be shown to the whole tenant
        return case((or_(*widened), EVERYBODY), else_=func.nullif(user_id, ""))


def is_shown(scope: ColumnElement[str | None]) -> ColumnElement[bool]:
    """Return the condition that a scope includes the person bound as `user_id`; an empty one sees the tenant's only."""
    return or_(scope == EVERYBODY, scope == bindparam("user_id"))
