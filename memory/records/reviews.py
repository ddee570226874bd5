"""An operator's decisions about single memories: approve, edit or retire an insight or an exemplar.

An approval shows the whole tenant a memory that one person, or nobody, was shown before, optionally in the operator's
words. A retired memory is shown to nobody again. Each decision is recorded with the API key that made it.

Invariants: a decision and its record are one transaction; a retired memory stays retired; a decision about an exemplar
changes its shown text, never the recorded steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, case, or_
from sqlalchemy.orm import defer
from sqlmodel import Session, col, select

from memory.errors import IllegalMove, UnknownInsight, UnknownTrajectory
from memory.records.exemplar_corrections import find_corrections, is_approved_since
from memory.records.exemplars import read_exemplar
from memory.records.insights import FIRST_STRENGTH, key_of, tidy
from memory.records.trajectories import UNLISTED_COLUMNS, Trajectories
from memory.schema import Insight, Outbox, Review, ReviewKind, Trajectory, new_id, now
from memory.scopes import EVERYBODY, Scopes
from memory.storage.database import Database
from memory.trust import is_trusted


class Status(StrEnum):
    """The status by which memories are listed."""

    ACTIVE = "active"  # shown to somebody, or waiting for approval
    PENDING = "pending"  # the active ones that one person is shown, or nobody: an approval would widen them
    APPROVED = "approved"
    RETIRED = "retired"
    REMOVED = "removed"  # insights that evidence contradicted


@dataclass(frozen=True)
class ListedInsight:
    """An insight with the scope that it is shown to."""

    insight: Insight
    scope: str | None
    """A person, the whole tenant (empty), or nobody (None)."""


@dataclass(frozen=True)
class ListedExemplar:
    """An exemplar with the scope and the text in which it is shown."""

    trajectory: Trajectory
    scope: str | None
    text: str
    """Empty where there is none that may be shown."""


class Reviews:
    """All decisions, and the memories that they concern."""

    def __init__(self, database: Database, trajectories: Trajectories, scopes: Scopes) -> None:
        self._database = database
        self._trajectories = trajectories
        self._scopes = scopes

    def insights(
        self, *, tenant: str, status: Status = Status.ACTIVE, environment: str | None = None, kind: str | None = None
    ) -> list[ListedInsight]:
        """Return a tenant's insights of one status, strongest first."""
        scope = _shown_to(Insight, self._scopes.of_insight())
        is_active = col(Insight.removed_at).is_(None)
        condition = {
            Status.ACTIVE: is_active,
            Status.PENDING: and_(is_active, _is_narrow(scope)),
            Status.APPROVED: and_(is_active, col(Insight.approved_at).is_not(None)),
            Status.RETIRED: col(Insight.retired_at).is_not(None),
            Status.REMOVED: and_(~is_active, col(Insight.retired_at).is_(None)),
        }[status]
        query = select(Insight, scope).where(Insight.tenant == tenant, condition)
        for column, wanted in ((Insight.environment, environment), (Insight.kind, kind)):
            if wanted is not None:
                query = query.where(column == wanted)
        query = query.order_by(col(Insight.strength).desc(), col(Insight.wins).desc(), col(Insight.id))
        with self._database.read() as session:
            return [ListedInsight(*row) for row in session.exec(query).all()]

    def exemplars(
        self, *, tenant: str, status: Status = Status.ACTIVE, limit: int = 50, before_id: str | None = None
    ) -> list[ListedExemplar]:
        """Return a tenant's exemplars of one status, newest first. Raises: ValueError for a status of insights only."""
        scope = _shown_to(Trajectory, self._scopes.of_exemplar())
        is_active = col(Trajectory.retired_at).is_(None)
        conditions = {
            Status.ACTIVE: is_active,
            Status.PENDING: and_(is_active, _is_narrow(scope)),
            Status.APPROVED: and_(is_active, col(Trajectory.approved_at).is_not(None)),
            Status.RETIRED: ~is_active,
        }
        if status not in conditions:
            raise ValueError(f"no exemplar is ever {status.value!r}: choose among {[it.value for it in conditions]!r}")
        query = self._trajectories.successes(scope).where(col(Trajectory.tenant) == tenant, conditions[status])
        query = query.options(*map(defer, UNLISTED_COLUMNS))
        if before_id is not None:
            query = query.where(col(Trajectory.id) < before_id)
        with self._database.read() as session:
            rows = session.execute(query.order_by(col(Trajectory.id).desc()).limit(limit)).all()
            texts = [read_exemplar(session, row, self._scopes) for row, _ in rows]
        return [
            ListedExemplar(row, None if text is None else row_scope, text or "")
            for (row, row_scope), text in zip(rows, texts, strict=True)
        ]

    def of(self, row_id: str, *, tenant: str) -> list[Review]:
        """Return the decisions about one memory, oldest first."""
        query = select(Review).where(Review.row_id == row_id, Review.tenant == tenant)
        with self._database.read() as session:
            return list(session.exec(query.order_by(col(Review.id))))

    async def approve_insight(
        self, insight_id: str, *, tenant: str, key_id: str | None = None, text: str | None = None
    ) -> Insight:
        """Show an insight to the whole tenant, as it is or reworded as `text`; return the approved row.

        Where an insight of the whole tenant has the same text already, that one is approved and this one removed.
        Raises: UnknownInsight; IllegalMove for an inactive insight or a retired text; ValueError for a blank text.
        """

        def write(session: Session) -> Insight:
            insight = _require_active(session, insight_id, tenant)
            new_text = _require_text(insight.text if text is None else text)
            # Recorded before the change: the review keeps the person from before the approval.
            _record(session, ReviewKind.APPROVE, insight, insight.user_id, key_id, text)
            twin = _free_text(session, insight, EVERYBODY, new_text)
            approved = insight if twin is None else twin
            if twin is not None:
                _remove(session, insight)
            approved.user_id, approved.text = EVERYBODY, new_text
            approved.approved_at = now()
            # Strong enough to be shown, whatever its evidence so far.
            approved.strength = max(approved.strength, insight.strength, FIRST_STRENGTH)
            _save(session, approved)
            return approved

        return await self._database.write(write)

    async def edit_insight(
        self, insight_id: str, text: str, *, tenant: str, key_id: str | None = None
    ) -> ListedInsight:
        """Reword an insight; its scope stays the same.

        Raises: as `approve_insight`; IllegalMove also when another active insight has that text.
        """

        def write(session: Session) -> ListedInsight:
            insight = _require_active(session, insight_id, tenant)
            new_text = _require_text(text)
            _record(session, ReviewKind.EDIT, insight, insight.user_id, key_id, new_text)
            twin = _free_text(session, insight, insight.user_id, new_text)
            if twin is not None:
                raise IllegalMove(f"insight {twin.id!r} says {new_text!r} already: retire one of the two")
            insight.text = new_text
            _save(session, insight)
            scope = session.scalar(
                select(_shown_to(Insight, self._scopes.of_insight())).where(Insight.id == insight_id)
            )
            return ListedInsight(insight, scope)

        return await self._database.write(write)

    async def retire_insight(self, insight_id: str, *, tenant: str, key_id: str | None = None) -> Insight:
        """Retire an insight: it is shown to nobody again, and no evidence brings its text back.

        One of the whole tenant is retired in every person's list, too. Raises: UnknownInsight.
        """

        def write(session: Session) -> Insight:
            insight = _require(session, insight_id, tenant)
            if insight.retired_at is not None:
                return insight
            _record(session, ReviewKind.RETIRE, insight, insight.user_id, key_id, None)
            # None: the lists of all persons.
            user_id = None if insight.user_id == EVERYBODY else insight.user_id
            same = _with_same_text(session, insight, insight.text, user_id)
            for each in {insight.id: insight, **{it.id: it for it in same}}.values():
                each.retired_at = now()
                _remove(session, each)
            return insight

        return await self._database.write(write)

    async def approve_exemplar(
        self, trajectory_id: str, *, tenant: str, key_id: str | None = None, text: str | None = None
    ) -> ListedExemplar:
        """Show a success to the whole tenant, as it is or reworded as `text`.

        Raises: UnknownTrajectory; IllegalMove for a trajectory that is no exemplar; ValueError for a blank text.
        """
        if text is not None and not text.strip():
            raise ValueError(f"an exemplar needs a text, not {text!r}: leave the text out, or retire it")

        def write(session: Session) -> ListedExemplar:
            trajectory, _ = self._require_exemplar(session, trajectory_id, tenant)
            _record(session, ReviewKind.APPROVE, trajectory, trajectory.user_id, key_id, text)
            corrections = find_corrections(session, trajectory_id)
            if text is None and corrections and not is_approved_since(trajectory, corrections[0]):
                trajectory.exemplar_text = None  # it was written before the correction
            trajectory.approved_at = now()
            trajectory.exemplar_text = trajectory.exemplar_text if text is None else text
            session.add(trajectory)
            session.add(Outbox(collection="exemplars", row_id=trajectory_id))
            shown = read_exemplar(session, trajectory, self._scopes)
            # raised inside the transaction, which undoes the approval above
            if shown is None:
                raise IllegalMove(
                    f"an earlier reply of {trajectory_id!r} was corrected: approve it with a text, or retire it"
                )
            return ListedExemplar(trajectory, EVERYBODY, shown)

        return await self._database.write(write)

    async def edit_exemplar(
        self, trajectory_id: str, text: str, *, tenant: str, key_id: str | None = None
    ) -> ListedExemplar:
        """Reword an exemplar; its scope stays the same.

        Raises: as `approve_exemplar`; IllegalMove also for one that was corrected since it was last approved.
        """
        if not text.strip():
            raise ValueError(f"an exemplar needs a text, not {text!r}: retire it instead")

        def write(session: Session) -> ListedExemplar:
            trajectory, scope = self._require_exemplar(session, trajectory_id, tenant)
            corrections = find_corrections(session, trajectory_id)
            # such a text would not be shown: the words that a correction makes wrong are replaced by an approval alone
            if corrections and not is_approved_since(trajectory, corrections[0]):
                raise IllegalMove(f"{trajectory_id!r} was corrected: approve it with a text, or retire it")
            _record(session, ReviewKind.EDIT, trajectory, trajectory.user_id, key_id, text)
            trajectory.exemplar_text = text
            session.add(trajectory)
            session.add(Outbox(collection="exemplars", row_id=trajectory_id))
            return ListedExemplar(trajectory, scope, text)

        return await self._database.write(write)

    def _require_exemplar(self, session: Session, trajectory_id: str, tenant: str) -> tuple[Trajectory, str | None]:
        """Return an exemplar that was not retired, and the scope that it is shown to."""
        trajectory = _require_trajectory(session, trajectory_id, tenant)
        if trajectory.retired_at is not None:
            raise IllegalMove(f"trajectory {trajectory_id!r} was retired: it cannot be approved or edited any more")
        successes = self._trajectories.successes(_shown_to(Trajectory, self._scopes.of_exemplar()))
        row = session.execute(successes.where(col(Trajectory.id) == trajectory_id)).first()
        if row is None:
            raise IllegalMove(
                f"trajectory {trajectory_id!r} is no exemplar: only a finished success of a task that is not held out "
                "is one"
            )
        return trajectory, row[1]

    async def retire_exemplar(self, trajectory_id: str, *, tenant: str, key_id: str | None = None) -> ListedExemplar:
        """Retire an exemplar: it is shown to nobody again and yields no more insights. Raises: UnknownTrajectory."""

        def write(session: Session) -> ListedExemplar:
            trajectory = _require_trajectory(session, trajectory_id, tenant)
            if trajectory.retired_at is None:
                _record(session, ReviewKind.RETIRE, trajectory, trajectory.user_id, key_id, None)
                trajectory.retired_at = now()
                session.add(trajectory)
                session.add(Outbox(collection="exemplars", row_id=trajectory_id, is_removed=True))
            return ListedExemplar(trajectory, None, read_exemplar(session, trajectory, self._scopes) or "")

        return await self._database.write(write)


def _shown_to(table: type[Insight] | type[Trajectory], scope: ColumnElement[str | None]) -> ColumnElement[str | None]:
    """Return the scope that a row is shown to: nobody while it is not trusted."""
    return case((is_trusted(table), scope), else_=None)


def _is_narrow(scope: ColumnElement[str | None]) -> ColumnElement[bool]:
    """Return the condition that a scope is narrower than the whole tenant."""
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
        raise IllegalMove(f"insight {insight_id!r} was {how}: only an active one can be approved or edited")
    return insight


def _require_trajectory(session: Session, trajectory_id: str, tenant: str) -> Trajectory:
    trajectory = session.get(Trajectory, trajectory_id)
    if trajectory is None or trajectory.tenant != tenant:
        raise UnknownTrajectory(f"no trajectory has the id {trajectory_id!r}: list them to see which exist")
    return trajectory


def _require_text(text: str) -> str:
    tidied = tidy(text)
    if not tidied:
        raise ValueError(f"an insight needs a text, not {text!r}: retire it instead")
    return tidied


def _with_same_text(session: Session, insight: Insight, text: str, user_id: str | None) -> Sequence[Insight]:
    """Return the insights with this text about the same kind of task, in one person's list or in all lists."""
    query = select(Insight).where(
        Insight.tenant == insight.tenant, Insight.environment == insight.environment, Insight.kind == insight.kind
    )
    if user_id is not None:
        query = query.where(Insight.user_id == user_id)
    return [it for it in session.exec(query) if key_of(it.text) == key_of(text)]


def _free_text(session: Session, insight: Insight, user_id: str, text: str) -> Insight | None:
    """Return another active insight that has this text in a list, if any.

    One that evidence removed is deleted, because texts are unique. Raises: IllegalMove for a retired text.
    """
    twin = None
    for other in _with_same_text(session, insight, text, user_id):
        if other.id == insight.id:
            continue
        if other.retired_at is not None:
            raise IllegalMove(f"insight {other.id!r} with the text {text!r} was retired: choose another text")
        if other.removed_at is None:
            twin = other
        else:
            # deleted and not renamed: the unique constraint counts removed texts too (memory/schema.py)
            session.delete(other)
    session.flush()
    return twin


def _remove(session: Session, insight: Insight) -> None:
    insight.removed_at = insight.removed_at or now()
    insight.strength = 0
    _save(session, insight)


def _save(session: Session, insight: Insight) -> None:
    """Store an insight and queue it for the index."""
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
