"""The role in which a policy made a call, in a team."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("role", sa.String(length=16), nullable=True))


def downgrade() -> None:
    op.drop_column("steps", "role")
