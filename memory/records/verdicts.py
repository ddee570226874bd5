"""The ledger of the release gate: which comparisons were made, in which order, on which tasks.

Invariants: the look numbers of an incumbent are never used twice; a comparison is entered before it is decided, so one
that is abandoned half-way still counts; an entry that was decided never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from sqlalchemy import func
from sqlmodel import Session, col, select

from memory.schema import StoredVerdict
from memory.storage.database import Database


class Verdicts:
    """All comparisons of a candidate with an incumbent."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def open(self, verdict: StoredVerdict, *, choose_alpha: Callable[[int], float]) -> StoredVerdict:
        """Enter a comparison with the next look number of its incumbent, and what `choose_alpha` gives that look.
        Repeated with the same id, return the entry as it is: a stage that is repeated spends nothing twice."""

        def write(session: Session) -> StoredVerdict:
            known = session.get(StoredVerdict, verdict.id)
            if known is not None:
                return known
            newest = select(func.max(StoredVerdict.look)).where(StoredVerdict.incumbent == verdict.incumbent)
            look = (session.scalar(newest) or 0) + 1
            values = {**verdict.model_dump(), "look": look, "alpha": choose_alpha(look)}
            entered = StoredVerdict(**values)
            session.add(entered)
            return entered

        return await self._database.write(write)

    async def close(
        self,
        verdict_id: str,
        decision: str,
        *,
        was_tested: bool,
        tasks: Collection[str] = (),
        sealed: tuple[float, int] = (0.0, 0),
    ) -> StoredVerdict:
        """Enter the decision; without a test the look is free again, and no task was used.
        `sealed` is (successes, tasks) of the sealed block."""

        def write(session: Session) -> StoredVerdict:
            verdict = session.get_one(StoredVerdict, verdict_id)
            if verdict.decision is not None:
                return verdict
            verdict.decision = decision
            if was_tested:
                verdict.tasks = list(tasks)
            else:
                verdict.look, verdict.alpha = None, 0.0
            verdict.sealed_successes, verdict.sealed_tasks = sealed
            session.add(verdict)
            return verdict

        return await self._database.write(write)

    def alpha_spent(self, incumbent: int) -> float:
        """Return what all looks at this incumbent together have spent."""
        query = select(func.sum(StoredVerdict.alpha)).where(StoredVerdict.incumbent == incumbent)
        with self._database.read() as session:
            return session.scalar(query) or 0.0

    def tasks_used(self, candidate: int) -> set[str]:
        """Return the tasks that decided on this candidate before."""
        query = select(StoredVerdict.tasks).where(StoredVerdict.candidate == candidate)
        with self._database.read() as session:
            return {task for tasks in session.exec(query) for task in tasks or ()}

    def held_out_end(self, environment: str) -> int:
        """Return where the next block of held-out tasks starts: behind all that were ever begun."""
        query = select(func.max(StoredVerdict.held_out_end)).where(StoredVerdict.environment == environment)
        with self._database.read() as session:
            return session.scalar(query) or 0

    def num_sealed(self, environment: str) -> int:
        """Return how many releases touched the sealed block."""
        query = select(func.count()).where(StoredVerdict.environment == environment, StoredVerdict.sealed_tasks > 0)
        with self._database.read() as session:
            return session.scalar(query) or 0

    def select(self, *, limit: int = 100) -> list[StoredVerdict]:
        """Return entries, newest first."""
        query = select(StoredVerdict).order_by(col(StoredVerdict.created_at).desc()).limit(limit)
        with self._database.read() as session:
            return list(session.exec(query))
