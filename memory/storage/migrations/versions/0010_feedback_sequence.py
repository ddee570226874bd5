"""The order in which feedback came, which a clock that is set back does not change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

EPOCH = datetime(1970, 1, 1)


def upgrade() -> None:
    op.add_column("feedback", sa.Column("sequence", sa.BigInteger(), nullable=False, server_default="0"))
    feedback = sa.table(
        "feedback",
        sa.column("tenant", sa.String),
        sa.column("id", sa.String),
        sa.column("created_at", sa.DateTime),
        sa.column("sequence", sa.BigInteger),
    )
    connection = op.get_bind()
    # Read whole before anything is written: SQLite would go on reading what changes under it.
    rows = connection.execute(sa.select(feedback.c.tenant, feedback.c.id, feedback.c.created_at)).all()
    is_row = sa.and_(feedback.c.tenant == sa.bindparam("of"), feedback.c.id == sa.bindparam("row_id"))
    if rows:
        connection.execute(
            feedback.update().where(is_row).values(sequence=sa.bindparam("number")),
            [{"of": tenant, "row_id": row_id, "number": _microseconds(at)} for tenant, row_id, at in rows],
        )


def _microseconds(moment: datetime) -> int:
    naive = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo is not None else moment
    return (naive - EPOCH) // timedelta(microseconds=1)


def downgrade() -> None:
    op.drop_column("feedback", "sequence")
