"""The ledger of the release gate: all comparisons, their order, and the tasks that each used.

Invariants: the look numbers of an incumbent are never used twice; a comparison is stored before it is decided, so an
abandoned one still counts; a decided entry never changes.
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
        """Store a comparison with the next look number of its incumbent and `choose_alpha(look)` as its error budget.

        Idempotent: a known id returns the stored entry, so a repeated stage spends nothing twice.
        """

        def write(session: Session) -> StoredVerdict:
            known = session.get(StoredVerdict, verdict.id)
            if known is not None:
                return known
            newest = select(func.max(StoredVerdict.look)).where(StoredVerdict.incumbent == verdict.incumbent)
            look = (session.scalar(newest) or 0) + 1  # no race: one writer at a time
            values = {**verdict.model_dump(), "look": look, "alpha": choose_alpha(look)}
            entry = StoredVerdict(**values)
            session.add(entry)
            return entry

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
        """Store the decision. Without a test the look number is free again, and no task counts as used.

        `sealed` is (successes, tasks) of the sealed block.
        """

        def write(session: Session) -> StoredVerdict:
            verdict = session.get_one(StoredVerdict, verdict_id)
            if verdict.decision is not None:
                return verdict
            verdict.decision = decision
            if was_tested:
                verdict.tasks = list(tasks)
            else:
                # NULL, because the unique constraint on (incumbent, look) allows many of those; its block of held-out
                # tasks stays used (held_out_end)
                verdict.look, verdict.alpha = None, 0.0
            verdict.sealed_successes, verdict.sealed_tasks = sealed
            session.add(verdict)
            return verdict

        return await self._database.write(write)

    def alpha_spent(self, incumbent: int) -> float:
        """Return the error budget that all looks at this incumbent have spent."""
        query = select(func.sum(StoredVerdict.alpha)).where(StoredVerdict.incumbent == incumbent)
        with self._database.read() as session:
            return session.scalar(query) or 0.0

    def tasks_used(self, candidate: int) -> set[str]:
        """Return the tasks of all decided comparisons of this candidate."""
        query = select(StoredVerdict.tasks).where(StoredVerdict.candidate == candidate)
        with self._database.read() as session:
            return {task for tasks in session.exec(query) for task in tasks or ()}

    def held_out_end(self, environment: str) -> int:
        """Return the start of the next block of held-out tasks: behind all blocks of earlier comparisons."""
        query = select(func.max(StoredVerdict.held_out_end)).where(StoredVerdict.environment == environment)
        with self._database.read() as session:
            return session.scalar(query) or 0

    def num_sealed(self, environment: str) -> int:
        """Return the number of comparisons that used the sealed block."""
        query = select(func.count()).where(StoredVerdict.environment == environment, StoredVerdict.sealed_tasks > 0)
        with self._database.read() as session:
            return session.scalar(query) or 0

    def select(self, *, limit: int = 100) -> list[StoredVerdict]:
        """Return entries, newest first."""
        query = select(StoredVerdict).order_by(col(StoredVerdict.created_at).desc()).limit(limit)
        with self._database.read() as session:
            return list(session.exec(query))
