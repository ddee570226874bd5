"""The column that says whether the text index holds a row of the outbox is named after what it says."""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE outbox RENAME COLUMN is_worded TO is_in_text_index")


def downgrade() -> None:
    op.execute("ALTER TABLE outbox RENAME COLUMN is_in_text_index TO is_worded")
