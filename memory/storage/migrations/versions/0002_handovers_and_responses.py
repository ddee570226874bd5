"""Episodes that wait for their client, and stored responses."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("handover_digest", sa.String(), nullable=True))
    op.create_index(
        "steps_by_handover",
        "steps",
        ["handover_digest"],
        sqlite_where=sa.text("handover_digest IS NOT NULL"),
        postgresql_where=sa.text("handover_digest IS NOT NULL"),
    )
    op.create_table(
        "responses",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("trajectory_id", sa.String(), nullable=False),
        sa.Column("previous_id", sa.String(), nullable=True),
        sa.Column("input", sa.JSON(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["trajectory_id"],
            ["trajectories.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_responses_trajectory_id", "responses", ["trajectory_id"])


def downgrade() -> None:
    op.drop_table("responses")
    op.drop_index("steps_by_handover", "steps")
    op.drop_column("steps", "handover_digest")
