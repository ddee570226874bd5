"""Semantic memory in words: insights, each with a strength that evidence raises and lowers.

This module refuses to know where operations come from (a contrast of tallies, a model's critique) and how insights
are shown. The operations and their limits are ExpeL's (arXiv 2308.10144), with two departures: counts travel with
an operation, and an ADD of a text that is there counts as AGREE instead of nothing. At most 4 operations a critique
is for whoever asks the critic.

Invariants: one row per (tenant, person, environment, kind of task, text); strength is above 0 as long as an insight is
active; words that an operator retired never come back, and those that one approved are not changed by evidence; an
insight is shared only while all its words come from what is shared.
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
OVERFLOW = 5  # the list counts as full when it is this much over its maximum


class OperationKind(StrEnum):
    """What to do with an insight. The order is the order of application."""

    REMOVE = "remove"
    AGREE = "agree"
    EDIT = "edit"
    ADD = "add"


@dataclass(frozen=True)
class SupportCounts:
    """Episodes behind an insight: those that did what it says, and those that did otherwise where it applied."""

    wins: int = 0
    losses: int = 0
    wins_otherwise: int = 0
    losses_otherwise: int = 0


@dataclass(frozen=True)
class InsightOperation:
    """One change to the insights about one kind of task. Only EDIT has a `new_text`."""

    kind: OperationKind
    environment: str
    task_kind: str
    text: str
    new_text: str | None = None
    counts: SupportCounts | None = None
    """The latest tally; it replaces the row's."""
    tenant: str = ""
    """Whose lesson it is: the tenant of the episodes behind it."""
    trust: Trust = Trust.TRUSTED
    """The least trust among the episodes behind it."""
    user_id: str = ""
    """The person of those episodes; empty: the whole tenant's."""
    is_shared: bool = False
    """Whether all episodes behind it are shared by their clients."""


Place = tuple[str, str, str, str]
"""(tenant, person, environment, kind of task): where lessons carry over."""


PLACE = ("tenant", "user_id", "environment", "kind")


class ActiveInsight(NamedTuple):
    """An insight in force: what it says, and what speaks for it."""

    id: str
    text: str
    strength: int
    wins: int
    losses: int
    wins_otherwise: int
    losses_otherwise: int


class Insights:
    """All lessons in words."""

    def __init__(self, database: Database, *, max_kept: int = 20, scopes: Scopes | None = None) -> None:
        self._database = database
        self._max_kept = max_kept
        self._scopes = scopes or Scopes()
        self._visible = _visible_statement(self._scopes)

    async def apply(
        self, operations: list[InsightOperation], *, evidence: Iterable[tuple[str, str]] = ()
    ) -> list[Insight]:
        """Apply all operations in one transaction, REMOVE first and ADD last; return the insights they changed.

        `evidence` are the (trajectory id, kind of reading) that the operations were drawn from; they are kept in the
        same transaction, and `read_evidence` returns them, so that nothing is drawn from them again. Operations on an
        insight that isn't there are ignored: critics misquote. Raises: ValueError for a blank text.
        """
        for operation in operations:
            _check(operation)
        ordered = sorted(operations, key=lambda operation: list(OperationKind).index(operation.kind))

        def write(session: Session) -> list[Insight]:
            lists = _Lists(session, self._max_kept)
            changed = [insight for operation in ordered if (insight := lists.apply(operation)) is not None]
            for trajectory_id, reading in evidence:
                session.merge(ReadEpisode(trajectory_id=trajectory_id, reading=reading))
            return list({insight.id: insight for insight in changed}.values())

        return await self._database.write(write)

    def read_evidence(self, *, since_id: str = "") -> set[tuple[str, str]]:
        """Return the (trajectory id, kind of reading) that operations were drawn from; of older episodes than
        `since_id` none."""
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
        """Return a tenant's insights in force, strongest first: all of them, those in one person's list (`user_id`,
        empty for the tenant's own), or those of one scope."""
        place = {"tenant": tenant, "user_id": user_id, "environment": environment, "kind": kind}
        given = {name: value for name, value in place.items() if value is not None}
        query = select(Insight)
        if scope is not None:
            query = query.where(self._scopes.of_insight() == scope)
        with self._database.read() as session:
            return list(session.exec(_in_force(query, given), params=given))

    def visible(self, environment: str, kind: str, *, tenant: str, user_id: str = "") -> list[ActiveInsight]:
        """Return what is trusted and may be shown to a person of the tenant, of one kind of task: as much of it as a
        request needs."""
        place = {"tenant": tenant, "user_id": user_id, "environment": environment, "kind": kind}
        return [ActiveInsight(*row) for row in self._database.fetch(self._visible, place)]


def _in_force(query: Select, names: Iterable[str]) -> Select:
    """Narrow the query to active insights by these columns, strongest first."""
    query = query.where(
        col(Insight.removed_at).is_(None), *(getattr(Insight, name) == bindparam(name) for name in names)
    )
    return query.order_by(col(Insight.strength).desc(), col(Insight.wins).desc(), col(Insight.id))


def _visible_statement(scopes: Scopes) -> Select:
    """The hot path's query. The lists to look into are named for the database's sake, which would read those of all
    persons otherwise; whether a row is shown, its scope decides."""
    query = sql_select(*(getattr(Insight, name) for name in ActiveInsight._fields)).where(
        is_shown(scopes.of_insight()), is_trusted(Insight)
    )
    if not scopes.shares_live:
        query = query.where(col(Insight.user_id).in_([EVERYBODY, bindparam("user_id")]))
    return _in_force(query, ("tenant", "environment", "kind"))


class _Lists:
    """The insights that one call touches, one list per kind of task, as one transaction sees them."""

    def __init__(self, session: Session, max_kept: int) -> None:
        self._session = session
        self._max_kept = max_kept
        self._lists: dict[Place, dict[str, Insight]] = {}
        self._full: dict[Place, bool] = {}

    def apply(self, operation: InsightOperation) -> Insight | None:
        """Apply one operation; return the insight that changed."""
        place = (operation.tenant, operation.user_id, operation.environment, operation.task_kind)
        rows = self._rows(place)
        insight = rows.get(key_of(operation.text))
        is_active = insight is not None and insight.removed_at is None
        match operation.kind:
            case OperationKind.ADD | OperationKind.AGREE if is_active:
                insight.is_shared |= operation.is_shared  # the same words, found again among what is shared alone
                return self._strengthen(insight, _gain(insight, operation.counts), operation.counts)
            case OperationKind.ADD:
                return self._add(place, insight, operation.text, FIRST_STRENGTH, operation)
            case _ if not is_active:
                return None
            case OperationKind.REMOVE:
                cost = REMOVE_COST_WHEN_FULL if self._full[place] else REMOVE_COST
                return self._strengthen(insight, -cost, operation.counts)
            case OperationKind.EDIT if insight.approved_at is None:
                return self._edit(place, insight, operation)
        return None

    def _rows(self, place: Place) -> dict[str, Insight]:
        """Return this list's rows by text, removed ones too: their texts are taken."""
        if place not in self._lists:
            query = select(Insight).where(
                *(getattr(Insight, name) == value for name, value in zip(PLACE, place, strict=True))
            )
            rows = self._session.exec(query.order_by(col(Insight.removed_at).is_(None), col(Insight.id))).all()
            self._lists[place] = {key_of(insight.text): insight for insight in rows}
            num_active = sum(insight.removed_at is None for insight in rows)
            self._full[place] = num_active >= self._max_kept + OVERFLOW
        return self._lists[place]

    def _is_retired(self, place: Place, text: str) -> bool:
        """Whether an operator retired these words, in this list or for the whole tenant."""
        lists = (self._rows(place), self._rows((place[0], EVERYBODY, *place[2:])))
        return any(found.retired_at is not None for rows in lists if (found := rows.get(key_of(text))) is not None)

    def _edit(self, place: Place, insight: Insight, operation: InsightOperation) -> Insight | None:
        if self._is_retired(place, operation.new_text):
            return None
        rows = self._rows(place)
        new_key = key_of(operation.new_text)
        other = rows.get(new_key)
        if other is not None and other is not insight:  # edited into a text that exists: the two become one
            strength = insight.strength
            self._strengthen(insight, -strength, None)
            if other.removed_at is None:
                other.is_shared |= operation.is_shared
                return self._strengthen(other, 1, operation.counts)
            return self._add(place, other, other.text, strength + 1, operation)
        del rows[key_of(insight.text)]
        insight.text = tidy(operation.new_text)
        insight.is_shared = operation.is_shared
        _set_trust(insight, operation.trust if insight.is_trusted else Trust.UNTRUSTED)
        rows[new_key] = insight
        return self._strengthen(insight, 1, operation.counts)

    def _add(
        self, place: Place, removed: Insight | None, text: str, strength: int, operation: InsightOperation
    ) -> Insight | None:
        """Make an insight, or bring back the removed one that has this text, unless an operator retired it."""
        if self._is_retired(place, text):
            return None
        insight = removed or Insight(id=new_id("ins"), text=tidy(text), **dict(zip(PLACE, place, strict=True)))
        insight.removed_at = None
        insight.is_shared = operation.is_shared
        insight.strength = 0
        _set_trust(insight, operation.trust)
        self._rows(place)[key_of(text)] = insight
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
        self._session.flush()  # one by one, in order: texts are unique at every moment
        return insight


def _gain(insight: Insight, counts: SupportCounts | None) -> int:
    """Return how much stronger a confirmation makes an insight: not at all where a tally has no new win to show,
    because the same episodes are counted again in every round."""
    return 1 if counts is None or counts.wins > insight.wins else 0


def _set_trust(insight: Insight, trust: Trust) -> None:
    """An approval was of the text as it was then: new words that are untrusted need another one."""
    insight.trust = trust
    if trust is Trust.UNTRUSTED:
        insight.approved_at = None


def _check(operation: InsightOperation) -> None:
    if not operation.text.strip():
        raise ValueError(f"an insight needs words, not {operation.text!r}: leave this {operation.kind.value} out")
    if operation.kind is OperationKind.EDIT and not (operation.new_text or "").strip():
        raise ValueError(f"the edit of {operation.text!r} needs a new_text: use REMOVE to be rid of it")


def tidy(text: str) -> str:
    return " ".join(text.split())


def key_of(text: str) -> str:
    """Two texts with the same key are the same insight, however they are spaced and capitalised."""
    return tidy(text).casefold()


def keys_of(texts: Iterable[str]) -> set[str]:
    """Return what insights are matched by, for callers that compare texts with stored ones."""
    return {key_of(text) for text in texts}
