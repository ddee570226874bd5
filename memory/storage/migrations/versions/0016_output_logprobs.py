"""Log-probs with which a reply was sampled."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("output_logprobs", sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    op.drop_column("steps", "output_logprobs")
