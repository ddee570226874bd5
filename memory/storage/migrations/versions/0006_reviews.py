"""What an operator decided about a memory: approved, edited, retired, by which key and when."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("trajectories", sa.Column("exemplar_text", sa.String(), nullable=True))
    op.add_column("insights", sa.Column("is_shared", sa.Boolean(), nullable=False, server_default=sa.false()))
    for table in ("trajectories", "insights"):
        op.add_column(table, sa.Column("approved_at", sa.DateTime(), nullable=True))
        op.add_column(table, sa.Column("retired_at", sa.DateTime(), nullable=True))
    op.create_table(
        "reviews",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("row_id", sa.String(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_reviews_row_id", "reviews", ["row_id"])


def downgrade() -> None:
    op.drop_table("reviews")
    for table in ("trajectories", "insights"):
        op.drop_column(table, "retired_at")
        op.drop_column(table, "approved_at")
    op.drop_column("insights", "is_shared")
    op.drop_column("trajectories", "exemplar_text")
