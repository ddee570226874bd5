"""Branches: episodes that replay the beginning of another one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("trajectories", sa.Column("branch_of", sa.String(), nullable=True))
    op.add_column("trajectories", sa.Column("branch_position", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("trajectories", "branch_position")
    op.drop_column("trajectories", "branch_of")
