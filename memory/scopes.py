"""Whose memory a row is: the whole tenant's, one person's, or nobody's.

A scope is a person's `user_id`, `EVERYBODY` for the whole tenant, or None (NULL in SQL) for nobody. What was practised
in an environment is the tenant's. What was lived in live traffic is the person's it was lived with, unless its client
shares it, an operator approved it, or `memory.share_live` is "tenant".

This is the only place that knows the rule. Rows are asked by it each time they are shown; the index repeats it only to
find them sooner, and may be behind.
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import ColumnElement, bindparam, case, func, literal, or_
from sqlmodel import col

from memory.schema import Insight, Trajectory

EVERYBODY = ""
"""The scope of what the whole tenant is shown."""


class Scopes:
    """The rule under one setting."""

    def __init__(self, share_live: Literal["user", "tenant"] = "user") -> None:
        self.shares_live = share_live == "tenant"

    def of_exemplar(self) -> ColumnElement[str | None]:
        """The scope of a trajectory that is shown as an exemplar."""
        return self._scope_of(
            col(Trajectory.user_id),
            col(Trajectory.environment).is_not(None),
            col(Trajectory.is_shared),
            col(Trajectory.approved_at).is_not(None),
        )

    def of_insight(self) -> ColumnElement[str | None]:
        """The scope of an insight. One of live traffic without a person was made before persons were known, or under
        another setting: of whom it speaks is unknown."""
        return self._scope_of(
            col(Insight.user_id),
            col(Insight.environment) != "",
            col(Insight.is_shared),
            col(Insight.approved_at).is_not(None),
        )

    def of_episode(self) -> ColumnElement[str | None]:
        """The scope of all that was said in an episode. An approval does not widen it: it is for the exemplar, which
        the operator may have reworded."""
        return self._scope_of(
            col(Trajectory.user_id), col(Trajectory.environment).is_not(None), col(Trajectory.is_shared)
        )

    def of_trajectory(self, trajectory: Trajectory) -> str | None:
        """Return what `of_episode` gives for this trajectory; None also for one that an operator retired."""
        if trajectory.retired_at is not None:
            return None
        if trajectory.environment is not None or trajectory.is_shared or self.shares_live:
            return EVERYBODY
        return trajectory.user_id or None

    def _scope_of(self, user_id: ColumnElement[str], *are_everybodys: ColumnElement[bool]) -> ColumnElement[str | None]:
        if self.shares_live:
            return literal(EVERYBODY)
        return case((or_(*are_everybodys), EVERYBODY), else_=func.nullif(user_id, ""))


def is_shown(scope: ColumnElement[str | None]) -> ColumnElement[bool]:
    """Whether rows of a scope are shown to the person bound as `user_id`; to nobody named, only what is everybody's."""
    return or_(scope == EVERYBODY, scope == bindparam("user_id"))
