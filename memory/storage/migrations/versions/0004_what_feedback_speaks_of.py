"""What a piece of feedback speaks of: an answer, one step, or the whole."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("feedback", sa.Column("target", sa.String(), nullable=False, server_default=""))
    op.add_column("feedback", sa.Column("answer_start", sa.Integer(), nullable=True))
    op.add_column("feedback", sa.Column("step", sa.Integer(), nullable=True))
    op.execute("UPDATE feedback SET target = trajectory_id")


def downgrade() -> None:
    op.drop_column("feedback", "step")
    op.drop_column("feedback", "answer_start")
    op.drop_column("feedback", "target")
