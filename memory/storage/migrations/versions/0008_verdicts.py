"""The ledger of the release gate: every comparison that was begun, what it spent, and how a policy serves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("policies", sa.Column("use_memory", sa.Boolean(), nullable=True))
    op.create_table(
        "verdicts",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("candidate", sa.Integer(), sa.ForeignKey("policies.version"), nullable=False),
        sa.Column("incumbent", sa.Integer(), sa.ForeignKey("policies.version"), nullable=False),
        sa.Column("cycle_id", sa.String(), nullable=True),
        sa.Column("environment", sa.String(), nullable=False),
        sa.Column("look", sa.Integer(), nullable=True),
        sa.Column("alpha", sa.Float(), nullable=False),
        sa.Column("held_out_end", sa.Integer(), nullable=False),
        sa.Column("decision", sa.String(), nullable=True),
        sa.Column("tasks", sa.JSON(), nullable=True),
        sa.Column("sealed_tasks", sa.Integer(), nullable=False),
        sa.Column("sealed_successes", sa.Float(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.UniqueConstraint("incumbent", "look"),
    )


def downgrade() -> None:
    op.drop_table("verdicts")
    op.drop_column("policies", "use_memory")
