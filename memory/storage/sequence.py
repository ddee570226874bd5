"""Continues the sequence of row ids when a database is opened, behind every stored row.

Ids and sequence numbers count microseconds since 1970 but never decrease: row order must survive the system clock going
backwards. `memory.schema` ensures that within a process; a new process must first read the highest stored number.
"""

from __future__ import annotations

from sqlalchemy import func
from sqlmodel import Session, col, select

from memory.schema import (
    ApiKey,
    Cycle,
    Document,
    Example,
    Feedback,
    Insight,
    Review,
    Reward,
    Trajectory,
    advance_sequence,
    sequence_of,
)
from memory.storage.database import Database

NUMBERED = (ApiKey, Cycle, Document, Example, Insight, Review, Reward, Trajectory)
"""Tables whose ids come from `new_id`. The highest id is read from the primary key's index."""


def continue_sequence(database: Database) -> None:
    """Make all new ids and sequence numbers sort behind the stored ones."""
    with database.read() as session:
        advance_sequence(_last_of(session))


def _last_of(session: Session) -> int:
    highest = (session.scalar(select(func.max(col(table.id)))) for table in NUMBERED)
    of_ids = [sequence_of(row_id) for row_id in highest if row_id is not None]
    # Feedback has a sequence of its own, because clients choose its ids.
    return max([*of_ids, session.scalar(select(func.max(col(Feedback.sequence)))) or 0])
