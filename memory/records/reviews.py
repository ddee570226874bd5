"""What an operator decides about single memories: approve, edit or retire an insight or an exemplar.

To approve is to let the whole tenant see what one person, or nobody, was shown until then; with a text, in the
operator's words. To retire is to show it to nobody again. Each decision is recorded with the key it was made with.

Invariants: a decision and its record are one transaction; what is retired stays so; a decision about an exemplar
changes what is shown of it, never the recorded steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, or_
from sqlmodel import Session, col, select

from memory.errors import IllegalMove, UnknownInsight, UnknownTrajectory
from memory.records.exemplar_corrections import find_corrections, is_approved_since
from memory.records.exemplars import read_exemplar
from memory.records.insights import FIRST_STRENGTH, key_of, tidy
from memory.records.trajectories import Trajectories
from memory.schema import Insight, Outbox, Review, ReviewKind, Trajectory, new_id, now
from memory.scopes import EVERYBODY, Scopes
from memory.storage.database import Database


class Status(StrEnum):
    """Which memories to list."""

    ACTIVE = "active"  # shown to somebody, or waiting for approval
    PENDING = "pending"  # of these, the ones that one person is shown, or nobody: approval would widen them
    APPROVED = "approved"
    RETIRED = "retired"
    REMOVED = "removed"  # insights that evidence spoke against


@dataclass(frozen=True)
class ListedInsight:
    insight: Insight
    scope: str | None
    """Who is shown it: a person, everybody of the tenant (empty), or nobody (None)."""


@dataclass(frozen=True)
class ListedExemplar:
    trajectory: Trajectory
    scope: str | None
    text: str
    """As it is shown."""


class Reviews:
    """All decisions, and the memories they are about."""

    def __init__(self, database: Database, trajectories: Trajectories, scopes: Scopes) -> None:
        self._database = database
        self._trajectories = trajectories
        self._scopes = scopes

    def insights(
        self, *, tenant: str, status: Status = Status.ACTIVE, environment: str | None = None, kind: str | None = None
    ) -> list[ListedInsight]:
        """Return a tenant's insights of one status, strongest first."""
        scope = self._scopes.of_insight()
        is_active = col(Insight.removed_at).is_(None)
        is_meant = {
            Status.ACTIVE: is_active,
            Status.PENDING: and_(is_active, _is_narrow(scope)),
            Status.APPROVED: and_(is_active, col(Insight.approved_at).is_not(None)),
            Status.RETIRED: col(Insight.retired_at).is_not(None),
            Status.REMOVED: and_(~is_active, col(Insight.retired_at).is_(None)),
        }[status]
        query = select(Insight, scope).where(Insight.tenant == tenant, is_meant)
        for column, wanted in ((Insight.environment, environment), (Insight.kind, kind)):
            if wanted is not None:
                query = query.where(column == wanted)
        query = query.order_by(col(Insight.strength).desc(), col(Insight.wins).desc(), col(Insight.id))
        with self._database.read() as session:
            return [ListedInsight(*row) for row in session.exec(query).all()]

    def exemplars(
        self, *, tenant: str, status: Status = Status.ACTIVE, limit: int = 50, before_id: str | None = None
    ) -> list[ListedExemplar]:
        """Return a tenant's exemplars of one status, newest first. Raises: ValueError for a status they never have."""
        scope = self._scopes.of_exemplar()
        is_active = col(Trajectory.retired_at).is_(None)
        conditions = {
            Status.ACTIVE: is_active,
            Status.PENDING: and_(is_active, _is_narrow(scope)),
            Status.APPROVED: and_(is_active, col(Trajectory.approved_at).is_not(None)),
            Status.RETIRED: ~is_active,
        }
        if status not in conditions:
            raise ValueError(f"no exemplar is ever {status.value!r}: choose among {[it.value for it in conditions]!r}")
        query = self._trajectories.successes(scope).where(Trajectory.tenant == tenant, conditions[status])
        if before_id is not None:
            query = query.where(col(Trajectory.id) < before_id)
        with self._database.read() as session:
            rows = session.exec(query.order_by(col(Trajectory.id).desc()).limit(limit)).all()
            read = [(row, its_scope, read_exemplar(session, row, self._scopes)) for row, its_scope in rows]
            return [ListedExemplar(row, None if text is None else scope, text or "") for row, scope, text in read]

    def of(self, row_id: str, *, tenant: str) -> list[Review]:
        """Return what was decided about one memory, oldest first."""
        query = select(Review).where(Review.row_id == row_id, Review.tenant == tenant)
        with self._database.read() as session:
            return list(session.exec(query.order_by(col(Review.id))))

    async def approve_insight(
        self, insight_id: str, *, tenant: str, key_id: str | None = None, text: str | None = None
    ) -> Insight:
        """Let the whole tenant see an insight, as it is or as `text`; return it. Where one of the tenant's own says the
        same, that one is approved, and this one goes.

        Raises: UnknownInsight; IllegalMove for one that is not in force, and for words that were retired; ValueError
        for a blank text.
        """

        def write(session: Session) -> Insight:
            insight = _require_active(session, insight_id, tenant)
            words = _words(insight.text if text is None else text)
            _record(session, ReviewKind.APPROVE, insight, insight.user_id, key_id, text)
            twin = _make_room(session, insight, EVERYBODY, words)
            approved = insight if twin is None else twin
            if twin is not None:
                _remove(session, insight)
            approved.user_id, approved.text = EVERYBODY, words
            approved.approved_at = now()
            approved.strength = max(approved.strength, insight.strength, FIRST_STRENGTH)
            _note(session, approved)
            return approved

        return await self._database.write(write)

    async def edit_insight(
        self, insight_id: str, text: str, *, tenant: str, key_id: str | None = None
    ) -> ListedInsight:
        """Put an insight into other words; who is shown it stays the same.

        Raises: as `approve_insight`; IllegalMove also where another insight says that already.
        """

        def write(session: Session) -> ListedInsight:
            insight = _require_active(session, insight_id, tenant)
            words = _words(text)
            _record(session, ReviewKind.EDIT, insight, insight.user_id, key_id, words)
            twin = _make_room(session, insight, insight.user_id, words)
            if twin is not None:
                raise IllegalMove(f"insight {twin.id!r} says {words!r} already: retire one of the two")
            insight.text = words
            _note(session, insight)
            scope = session.scalar(select(self._scopes.of_insight()).where(Insight.id == insight_id))
            return ListedInsight(insight, scope)

        return await self._database.write(write)

    async def retire_insight(self, insight_id: str, *, tenant: str, key_id: str | None = None) -> Insight:
        """Show an insight to nobody again, and have no evidence bring its words back; one of the whole tenant goes from
        every person's list, too. Raises: UnknownInsight."""

        def write(session: Session) -> Insight:
            insight = _require(session, insight_id, tenant)
            if insight.retired_at is not None:
                return insight
            _record(session, ReviewKind.RETIRE, insight, insight.user_id, key_id, None)
            alike = _alike(session, insight, insight.text, None if insight.user_id == EVERYBODY else insight.user_id)
            for each in {insight.id: insight, **{it.id: it for it in alike}}.values():
                each.retired_at = now()
                _remove(session, each)
            return insight

        return await self._database.write(write)

    async def approve_exemplar(
        self, trajectory_id: str, *, tenant: str, key_id: str | None = None, text: str | None = None
    ) -> ListedExemplar:
        """Let the whole tenant see a success, as it is or as `text`.

        Raises: UnknownTrajectory; IllegalMove for a trajectory that is no exemplar; ValueError for a blank text.
        """
        if text is not None and not text.strip():
            raise ValueError(f"an exemplar needs words, not {text!r}: leave the text out, or retire it")

        def write(session: Session) -> ListedExemplar:
            trajectory = _require_trajectory(session, trajectory_id, tenant)
            if trajectory.retired_at is not None:
                raise IllegalMove(f"trajectory {trajectory_id!r} was retired: it cannot be approved any more")
            is_success = self._trajectories.successes(self._scopes.of_exemplar()).where(Trajectory.id == trajectory_id)
            if session.exec(is_success).first() is None:
                raise IllegalMove(
                    f"trajectory {trajectory_id!r} is no exemplar: only a finished success of a task that is not held "
                    "out is one"
                )
            _record(session, ReviewKind.APPROVE, trajectory, trajectory.user_id, key_id, text)
            corrections = find_corrections(session, trajectory_id)
            if text is None and corrections and not is_approved_since(trajectory, corrections[0]):
                trajectory.exemplar_text = None  # words for the wrong answer
            trajectory.approved_at = now()
            trajectory.exemplar_text = trajectory.exemplar_text if text is None else text
            session.add(trajectory)
            session.add(Outbox(collection="exemplars", row_id=trajectory_id))
            shown = read_exemplar(session, trajectory, self._scopes)
            if shown is None:
                raise IllegalMove(
                    f"a reply in the midst of {trajectory_id!r} was corrected: approve it with a text, or retire it"
                )
            return ListedExemplar(trajectory, EVERYBODY, shown)

        return await self._database.write(write)

    async def retire_exemplar(self, trajectory_id: str, *, tenant: str, key_id: str | None = None) -> ListedExemplar:
        """Show a trajectory to nobody again, and draw no more insights from it. Raises: UnknownTrajectory."""

        def write(session: Session) -> ListedExemplar:
            trajectory = _require_trajectory(session, trajectory_id, tenant)
            if trajectory.retired_at is None:
                _record(session, ReviewKind.RETIRE, trajectory, trajectory.user_id, key_id, None)
                trajectory.retired_at = now()
                session.add(trajectory)
                session.add(Outbox(collection="exemplars", row_id=trajectory_id, is_removed=True))
            return ListedExemplar(trajectory, None, read_exemplar(session, trajectory, self._scopes) or "")

        return await self._database.write(write)


def _is_narrow(scope: ColumnElement[str | None]) -> ColumnElement[bool]:
    """Whether less than the whole tenant is shown what has this scope."""
    return or_(scope.is_(None), scope != EVERYBODY)


def _require(session: Session, insight_id: str, tenant: str) -> Insight:
    insight = session.get(Insight, insight_id)
    if insight is None or insight.tenant != tenant:
        raise UnknownInsight(f"no insight has the id {insight_id!r}: list them to see which there are")
    return insight


def _require_active(session: Session, insight_id: str, tenant: str) -> Insight:
    insight = _require(session, insight_id, tenant)
    if insight.removed_at is not None:
        how = "retired" if insight.retired_at is not None else "removed by evidence"
        raise IllegalMove(f"insight {insight_id!r} was {how}: only one in force can be approved or edited")
    return insight


def _require_trajectory(session: Session, trajectory_id: str, tenant: str) -> Trajectory:
    trajectory = session.get(Trajectory, trajectory_id)
    if trajectory is None or trajectory.tenant != tenant:
        raise UnknownTrajectory(f"no trajectory has the id {trajectory_id!r}: list them to see which exist")
    return trajectory


def _words(text: str) -> str:
    words = tidy(text)
    if not words:
        raise ValueError(f"an insight needs words, not {text!r}: retire it to be rid of it")
    return words


def _alike(session: Session, insight: Insight, text: str, user_id: str | None) -> Sequence[Insight]:
    """Return what says this of the same kind of task: in one list, or in all of the tenant's lists."""
    query = select(Insight).where(
        Insight.tenant == insight.tenant, Insight.environment == insight.environment, Insight.kind == insight.kind
    )
    if user_id is not None:
        query = query.where(Insight.user_id == user_id)
    return [it for it in session.exec(query) if key_of(it.text) == key_of(text)]


def _make_room(session: Session, insight: Insight, user_id: str, text: str) -> Insight | None:
    """Return the other insight in force that says this in a list. One that evidence removed is deleted: texts are
    unique. Raises: IllegalMove for words that were retired."""
    twin = None
    for other in _alike(session, insight, text, user_id):
        if other.id == insight.id:
            continue
        if other.retired_at is not None:
            raise IllegalMove(f"insight {other.id!r} with the words {text!r} was retired: choose other words")
        if other.removed_at is None:
            twin = other
        else:
            session.delete(other)
    session.flush()
    return twin


def _remove(session: Session, insight: Insight) -> None:
    insight.removed_at = insight.removed_at or now()
    insight.strength = 0
    _note(session, insight)


def _note(session: Session, insight: Insight) -> None:
    """Have the index look at it again."""
    session.add(insight)
    session.add(Outbox(collection="insights", row_id=insight.id, is_removed=insight.removed_at is not None))
    session.flush()


def _record(
    session: Session, kind: ReviewKind, row: Insight | Trajectory, user_id: str, key_id: str | None, text: str | None
) -> None:
    review = Review(
        id=new_id("rev"), tenant=row.tenant, key_id=key_id, kind=kind, row_id=row.id, user_id=user_id, text=text
    )
    session.add(review)
