"""Semantic memory in words: insights, each with a strength that evidence raises and lowers.

The operations and their limits are ExpeL's (arXiv 2308.10144), with three departures: support counts travel with an
operation; an ADD of an existing text counts as AGREE instead of being ignored; the limit of 4 operations for each
critique is left to the caller.

Invariants: one row for each (tenant, person, environment, kind of task, text); an active insight has a strength above
0; evidence never brings a retired text back and never edits an approved one; an insight is shared only while all
episodes behind its text are shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import Select, bindparam
from sqlalchemy import select as sql_select
from sqlmodel import Session, col, select

from memory.schema import Insight, Outbox, ReadEpisode, Trust, new_id, now
from memory.scopes import EVERYBODY, Scopes, is_shown
from memory.storage.database import Database
from memory.trust import is_trusted

FIRST_STRENGTH = 2
REMOVE_COST = 1
REMOVE_COST_WHEN_FULL = 3
OVERFLOW = 5  # a list is full when it is this much over its maximum


class OperationKind(StrEnum):
    """A change to an insight. Members are in the order of application."""

    REMOVE = "remove"
    AGREE = "agree"
    EDIT = "edit"
    ADD = "add"


@dataclass(frozen=True)
class SupportCounts:
    """Numbers of episodes that followed an insight, and of those that did otherwise where it applied."""

    wins: int = 0
    losses: int = 0
    wins_otherwise: int = 0
    losses_otherwise: int = 0


@dataclass(frozen=True)
class InsightOperation:
    """One change to the insights about one kind of task. The optimizer makes it; `Insights.apply` reads it."""

    kind: OperationKind
    environment: str
    task_kind: str
    text: str
    new_text: str | None = None
    """Of an EDIT only."""
    counts: SupportCounts | None = None
    """The latest counts; they replace the row's."""
    tenant: str = ""
    """The tenant of the episodes behind it."""
    trust: Trust = Trust.TRUSTED
    """The least trust among the episodes behind it."""
    user_id: str = ""
    """The person of those episodes; empty for an insight of the whole tenant."""
    is_shared: bool = False
    """Whether the clients of all those episodes share them with the whole tenant."""


SCOPE_COLUMNS = ("tenant", "user_id", "environment", "kind")
InsightScope = tuple[str, str, str, str]
"""The values of `SCOPE_COLUMNS`: insights with the same four values form one list."""


class ActiveInsight(NamedTuple):
    """The columns of an active insight that retrieval reads."""

    id: str
    text: str
    strength: int
    wins: int
    losses: int
    wins_otherwise: int
    losses_otherwise: int


class Insights:
    """All insights."""

    def __init__(self, database: Database, *, max_kept: int = 20, scopes: Scopes | None = None) -> None:
        self._database = database
        self._max_kept = max_kept
        self._scopes = scopes or Scopes()
        self._visible = _visible_statement(self._scopes)

    async def apply(
        self, operations: list[InsightOperation], *, evidence: Iterable[tuple[str, str]] = ()
    ) -> list[Insight]:
        """Apply all operations in one transaction, REMOVE first and ADD last; return the changed insights.

        `evidence` holds (trajectory id, kind of critique input) for the episodes behind the operations. It is stored in
        the same transaction and returned by `read_evidence`, so that no episode counts twice. Operations on an unknown
        insight are ignored, because critics misquote. Raises: ValueError for a blank text.
        """
        for operation in operations:
            _check(operation)
        # A stable sort: operations of one kind stay in the given order.
        ordered = sorted(operations, key=lambda operation: list(OperationKind).index(operation.kind))

        def write(session: Session) -> list[Insight]:
            lists = _Lists(session, self._max_kept)
            changed = [insight for operation in ordered if (insight := lists.apply(operation)) is not None]
            for trajectory_id, reading in evidence:
                # merge, not add: a repeated stage brings the same evidence.
                session.merge(ReadEpisode(trajectory_id=trajectory_id, reading=reading))
            return list({insight.id: insight for insight in changed}.values())

        return await self._database.write(write)

    def read_evidence(self, *, since_id: str = "") -> set[tuple[str, str]]:
        """Return (trajectory id, kind of critique input) of all evidence, without episodes older than `since_id`."""
        query = select(ReadEpisode).where(col(ReadEpisode.trajectory_id) >= since_id)
        with self._database.read() as session:
            return {(row.trajectory_id, row.reading) for row in session.exec(query)}

    def active(
        self,
        environment: str | None = None,
        kind: str | None = None,
        *,
        tenant: str = "",
        user_id: str | None = None,
        scope: str | None = None,
    ) -> list[Insight]:
        """Return a tenant's active insights, strongest first.

        `user_id` narrows them to one person's list (empty: the tenant's own); `scope` to those that are shown to one
        person, or to the whole tenant.
        """
        wanted = {"tenant": tenant, "user_id": user_id, "environment": environment, "kind": kind}
        values = {name: value for name, value in wanted.items() if value is not None}
        query = sql_select(Insight)
        if scope is not None:
            query = query.where(self._scopes.of_insight() == scope)
        with self._database.read() as session:
            return list(session.scalars(_only_active(query, values), values))

    def visible(self, environment: str, kind: str, *, tenant: str, user_id: str = "") -> list[ActiveInsight]:
        """Return the active, trusted insights of one kind of task that a person may be shown, strongest first."""
        values = {"tenant": tenant, "user_id": user_id, "environment": environment, "kind": kind}
        return [ActiveInsight(*row) for row in self._database.fetch(self._visible, values)]


def _only_active(query: Select, columns: Iterable[str]) -> Select:
    """Narrow a query to active insights with the bound values of these columns, strongest first."""
    query = query.where(
        col(Insight.removed_at).is_(None), *(getattr(Insight, name) == bindparam(name) for name in columns)
    )
    return query.order_by(col(Insight.strength).desc(), col(Insight.wins).desc(), col(Insight.id))


def _visible_statement(scopes: Scopes) -> Select:
    """Return the query of `visible`, which every request runs."""
    query = sql_select(*(getattr(Insight, name) for name in ActiveInsight._fields)).where(
        is_shown(scopes.of_insight()), is_trusted(Insight)
    )
    if not scopes.shares_live:
        # The scope alone decides; naming the lists keeps the database from reading those of all persons.
        query = query.where(col(Insight.user_id).in_([EVERYBODY, bindparam("user_id")]))
    return _only_active(query, ("tenant", "environment", "kind"))


class _Lists:
    """The insight lists that one transaction touches."""

    def __init__(self, session: Session, max_kept: int) -> None:
        self._session = session
        self._max_kept = max_kept
        self._lists: dict[InsightScope, dict[str, Insight]] = {}
        self._full: dict[InsightScope, bool] = {}

    def apply(self, operation: InsightOperation) -> Insight | None:
        """Apply one operation; return the changed insight, if any."""
        scope = (operation.tenant, operation.user_id, operation.environment, operation.task_kind)
        rows = self._rows(scope)
        insight = rows.get(key_of(operation.text))
        if insight is None or insight.removed_at is not None:
            is_add = operation.kind is OperationKind.ADD
            return self._add(scope, insight, operation.text, FIRST_STRENGTH, operation) if is_add else None
        match operation.kind:
            case OperationKind.ADD | OperationKind.AGREE:
                insight.is_shared |= operation.is_shared  # found again, this time in shared episodes only
                return self._strengthen(insight, _gain(insight, operation.counts), operation.counts)
            case OperationKind.REMOVE:
                cost = REMOVE_COST_WHEN_FULL if self._full[scope] else REMOVE_COST
                return self._strengthen(insight, -cost, operation.counts)
            case OperationKind.EDIT if insight.approved_at is None:
                return self._edit(scope, insight, operation)
        return None

    def _rows(self, scope: InsightScope) -> dict[str, Insight]:
        """Return the rows of one list by text key, removed ones included: their texts must stay unique."""
        if scope not in self._lists:
            query = select(Insight).where(
                *(getattr(Insight, name) == value for name, value in zip(SCOPE_COLUMNS, scope, strict=True))
            )
            # Active rows last: of two texts with the same key, the active one is used.
            rows = self._session.exec(query.order_by(col(Insight.removed_at).is_(None), col(Insight.id))).all()
            self._lists[scope] = {key_of(insight.text): insight for insight in rows}
            num_active = sum(insight.removed_at is None for insight in rows)
            self._full[scope] = num_active >= self._max_kept + OVERFLOW
        return self._lists[scope]

    def _is_retired(self, scope: InsightScope, text: str) -> bool:
        """Return whether an operator retired this text, in this list or for the whole tenant."""
        lists = (self._rows(scope), self._rows((scope[0], EVERYBODY, *scope[2:])))
        return any(row.retired_at is not None for rows in lists if (row := rows.get(key_of(text))) is not None)

    def _edit(self, scope: InsightScope, insight: Insight, operation: InsightOperation) -> Insight | None:
        new_text = operation.new_text or ""
        if self._is_retired(scope, new_text):
            return None
        rows = self._rows(scope)
        new_key = key_of(new_text)
        # looked up among removed texts too, because the unique constraint covers them
        other = rows.get(new_key)
        if other is not None and other is not insight:  # the new text exists already: merge the two
            strength = insight.strength
            self._strengthen(insight, -strength, None)
            if other.removed_at is None:
                other.is_shared |= operation.is_shared
                return self._strengthen(other, 1, operation.counts)
            return self._add(scope, other, other.text, strength + 1, operation)
        # before the text changes: the old key must not find the row any more
        del rows[key_of(insight.text)]
        insight.text = tidy(new_text)
        insight.is_shared = operation.is_shared
        _set_trust(insight, operation.trust if insight.is_trusted else Trust.UNTRUSTED)
        rows[new_key] = insight
        return self._strengthen(insight, 1, operation.counts)

    def _add(
        self, scope: InsightScope, removed: Insight | None, text: str, strength: int, operation: InsightOperation
    ) -> Insight | None:
        """Create an insight, or restore the removed one with this text, unless an operator retired it."""
        if self._is_retired(scope, text):
            return None
        insight = removed or Insight(id=new_id("ins"), text=tidy(text), **dict(zip(SCOPE_COLUMNS, scope, strict=True)))
        insight.removed_at = None
        insight.is_shared = operation.is_shared
        insight.strength = 0
        _set_trust(insight, operation.trust)
        self._rows(scope)[key_of(text)] = insight
        return self._strengthen(insight, strength, operation.counts)

    def _strengthen(self, insight: Insight, change: int, counts: SupportCounts | None) -> Insight:
        insight.strength = max(0, insight.strength + change)
        if counts is not None:
            insight.wins, insight.losses = counts.wins, counts.losses
            insight.wins_otherwise, insight.losses_otherwise = counts.wins_otherwise, counts.losses_otherwise
        if insight.strength == 0:
            insight.removed_at = now()
        self._session.add(insight)
        is_removed = insight.removed_at is not None
        self._session.add(Outbox(collection="insights", row_id=insight.id, is_removed=is_removed))
        self._session.flush()  # one by one: the unique constraint on texts holds after every statement
        return insight


def _gain(insight: Insight, counts: SupportCounts | None) -> int:
    """Return the gain of strength for a confirmation: 0 without a new win, because every round counts all episodes
    again."""
    return 1 if counts is None or counts.wins > insight.wins else 0


def _set_trust(insight: Insight, trust: Trust) -> None:
    """Set the trust of a new text. An untrusted one needs a new approval: the old one was for the old text."""
    insight.trust = trust
    if trust is Trust.UNTRUSTED:
        insight.approved_at = None


def _check(operation: InsightOperation) -> None:
    if not operation.text.strip():
        raise ValueError(f"an insight needs a text, not {operation.text!r}: leave this {operation.kind.value} out")
    if operation.kind is OperationKind.EDIT and not (operation.new_text or "").strip():
        raise ValueError(f"the edit of {operation.text!r} needs a new_text: use REMOVE to delete the insight")


def tidy(text: str) -> str:
    """Return a text with single spaces between its words."""
    return " ".join(text.split())


def key_of(text: str) -> str:
    """Return the key that identifies an insight's text, whatever its spaces and capitals."""
    return tidy(text).casefold()
