"""Where the order of rows goes on when a database is opened: behind every row that it holds.

Ids and sequence numbers count the microseconds since 1970, but never go back. Within a process `memory.schema` sees to
that; a process that starts with its clock set back must first learn the highest number that was given.
"""

from __future__ import annotations

from sqlalchemy import func
from sqlmodel import Session, col, select

from memory.schema import (
    ApiKey,
    Cycle,
    Document,
    Feedback,
    Insight,
    Review,
    Reward,
    Trajectory,
    advance_sequence,
    sequence_of,
)
from memory.storage.database import Database

NUMBERED = (ApiKey, Cycle, Document, Insight, Review, Reward, Trajectory)
"""The tables whose ids `new_id` makes. The highest one is read from the primary key's index."""


def continue_sequence(database: Database) -> None:
    """Have ids and numbers from now on sort behind those that the database holds."""
    with database.read() as session:
        advance_sequence(_last_of(session))


def _last_of(session: Session) -> int:
    highest = (session.scalar(select(func.max(col(table.id)))) for table in NUMBERED)
    of_ids = [sequence_of(row_id) for row_id in highest if row_id is not None]
    return max([*of_ids, session.scalar(select(func.max(col(Feedback.sequence)))) or 0])
