"""Learning cycles as rows: the stage of each, the results of its earlier stages, and its outcome.

Invariants: at most one cycle is open; a closed cycle never changes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from sqlmodel import Session, col, select

from memory.errors import CycleInProgress, IllegalMove, UnknownCycle
from memory.schema import Cycle, CycleStage, new_id, now
from memory.storage.database import Database

FINAL_STAGES = frozenset({CycleStage.COMPLETED, CycleStage.ERROR})
SAVED_FIELDS = frozenset({"stage", "settings", "artifacts", "progress", "verdict", "error"})


class Cycles:
    """All learning cycles, of which at most one is open."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # one clock, because one cycle is open at most; a restart begins it anew
        self._entered: tuple[str, float] | None = None
        self.stage_seconds: defaultdict[str, float] = defaultdict(float)
        """Total seconds of each stage, over all cycles since the start of the process."""

    async def open(self, settings: dict[str, Any]) -> Cycle:
        """Begin a cycle at COLLECT. Raises: CycleInProgress, naming the one that is open."""

        def write(session: Session) -> Cycle:
            other = _unfinished(session)
            if other is not None:
                raise CycleInProgress(f"cycle {other.id!r} is at {other.stage!r}: wait until it ends, or resume it")
            cycle = Cycle(id=new_id("cyc"), settings=settings)
            session.add(cycle)
            return cycle

        return await self._database.write(write)

    async def save(self, cycle_id: str, **fields: Any) -> Cycle:
        """Store the results of a stage: `artifacts` are merged, every other field is replaced.

        A final stage (COMPLETED, ERROR) closes the cycle. Raises: UnknownCycle, IllegalMove when it is closed.
        """
        unknown = fields.keys() - SAVED_FIELDS
        if unknown:
            raise ValueError(f"a cycle has no {sorted(unknown)!r} to save: choose among {sorted(SAVED_FIELDS)!r}")

        def write(session: Session) -> Cycle:
            cycle = _require(session, cycle_id)
            if cycle.stage in FINAL_STAGES:
                raise IllegalMove(f"cycle {cycle_id!r} ended as {cycle.stage!r}: open another")
            for name, value in fields.items():
                # a new dict: SQLAlchemy does not notice a change inside the old one
                setattr(cycle, name, cycle.artifacts | value if name == "artifacts" else value)
            # a member of CycleStage would be stored as its value, but stay a member here
            cycle.stage = str(cycle.stage)
            if cycle.stage in FINAL_STAGES:
                cycle.closed_at = now()
            session.add(cycle)
            return cycle

        cycle = await self._database.write(write)
        if "stage" in fields:
            self._clock(cycle.stage)
        return cycle

    def _clock(self, stage: str) -> None:
        now = time.monotonic()  # the wall clock may jump
        if self._entered is not None:
            self.stage_seconds[self._entered[0]] += now - self._entered[1]
        self._entered = None if stage in FINAL_STAGES else (stage, now)

    def outcomes(self) -> list[tuple[str, dict[str, Any] | None]]:
        """Return (final stage, verdict) of every closed cycle."""
        with self._database.read() as session:
            query = select(Cycle.stage, Cycle.verdict).where(col(Cycle.closed_at).is_not(None))
            return [(stage, None if verdict is None else dict(verdict)) for stage, verdict in session.exec(query)]

    def get(self, cycle_id: str) -> Cycle:
        """Return one cycle. Raises: UnknownCycle."""
        with self._database.read() as session:
            return _require(session, cycle_id)

    def unfinished(self) -> Cycle | None:
        """Return the open cycle, if there is one: it is running, or a crash interrupted it."""
        with self._database.read() as session:
            return _unfinished(session)

    def select(self, *, limit: int = 50) -> list[Cycle]:
        """Return cycles, newest first."""
        with self._database.read() as session:
            return list(session.exec(select(Cycle).order_by(col(Cycle.id).desc()).limit(limit)))


def _require(session: Session, cycle_id: str) -> Cycle:
    cycle = session.get(Cycle, cycle_id)
    if cycle is None:
        raise UnknownCycle(f"no cycle has the id {cycle_id!r}: list them to see which exist")
    return cycle


def _unfinished(session: Session) -> Cycle | None:
    # by the time of its close, not by its stage: methods of learning add stages of their own
    return session.exec(select(Cycle).where(col(Cycle.closed_at).is_(None))).first()
