"""Continues the rows' clock when a database is opened, behind every stored row.

Ids, sequence numbers and times come from one clock that never decreases (`memory.schema.next_sequence`): row order must
survive the system clock going backwards, and comparisons of times depend on it, such as whether an approval came after
a correction. A new process must first read the latest stored moment.

Invariant: no row is older than one that was stored before its process opened the database. Between processes that write
to one PostgreSQL database at the same time the order is that of their system clocks. Hazard: a system clock that was
ahead once, by years even, leaves the rows' clock ahead until the time has come.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Executable, func
from sqlmodel import Session, SQLModel, col, select

from memory.schema import (
    LEGAL_MOVES,
    Activation,
    ApiKey,
    Cycle,
    Document,
    Example,
    Feedback,
    Insight,
    Policy,
    Review,
    Reward,
    Step,
    StoredVerdict,
    Trajectory,
    TrajectoryStage,
    UtcDateTime,
    advance_sequence,
    sequence_at,
    sequence_of,
)
from memory.storage.database import Database

NUMBERED = (ApiKey, Cycle, Document, Example, Insight, Review, Reward, Trajectory)
"""Tables whose ids come from `new_id`. The highest id is read from the primary key's index."""
SMALL = (Activation, ApiKey, Cycle, Policy, StoredVerdict)
"""Tables that are small enough to read all their times."""


def continue_sequence(database: Database) -> None:
    """Make all new ids, sequence numbers and times sort behind the stored ones."""
    with database.read() as session:
        advance_sequence(max([0, *_numbers(session), *_times(session)]))


def _numbers(session: Session) -> Iterator[int]:
    for table in NUMBERED:
        yield sequence_of(session.scalar(select(func.max(col(table.id)))) or "")
    # Feedback has a sequence of its own, because clients choose its ids.
    yield session.scalar(select(func.max(col(Feedback.sequence)))) or 0


def _times(session: Session) -> Iterator[int]:
    """Yield times that are later than the number of their row, or whose row has none.

    Rows of large tables are read by an index: of a closed trajectory the end alone, since all else came before it.
    """
    is_running = col(Trajectory.stage) == TrajectoryStage.RUNNING
    queries: list[Executable] = [
        select(func.max(col(Trajectory.opened_at))).where(is_running),
        select(func.max(col(Step.created_at))).join(Trajectory).where(is_running),
    ]
    for stage in (it for it in TrajectoryStage if not LEGAL_MOVES[it]):
        queries.append(select(func.max(col(Trajectory.closed_at))).where(col(Trajectory.stage) == stage))
    for table in SMALL:
        columns = SQLModel.metadata.tables[str(table.__tablename__)].columns
        queries += [select(func.max(it)) for it in columns if isinstance(it.type, UtcDateTime)]
    newest = (session.scalar(query) for query in queries)
    yield from (sequence_at(moment) for moment in newest if moment is not None)
