"""Which episodes a critic has read, so that each of them is evidence once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "read_episodes",
        sa.Column("trajectory_id", sa.String(), nullable=False),
        sa.Column("reading", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["trajectory_id"], ["trajectories.id"]),
        sa.PrimaryKeyConstraint("trajectory_id", "reading"),
    )


def downgrade() -> None:
    op.drop_table("read_episodes")
