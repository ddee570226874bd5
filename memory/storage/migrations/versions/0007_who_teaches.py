"""Who may teach: whose feedback a reward comes from, and which replies and documents are untrusted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# Earlier episodes have no trust. Their rows reveal the use of a web page, but not of an MCP server.
DISTRUST_WEB_PAGES = """
UPDATE trajectories SET trust = 'untrusted'
WHERE id IN (SELECT trajectory_id FROM steps WHERE kind = 'tool' AND tool_name = 'fetch_page')
"""


def upgrade() -> None:
    op.add_column("rewards", sa.Column("key_id", sa.String(), nullable=True))
    op.add_column("rewards", sa.Column("user_id", sa.String(), nullable=False, server_default=""))
    op.add_column("trajectories", sa.Column("reply_digest", sa.String(), nullable=True))
    op.add_column("documents", sa.Column("trust", sa.String(length=16), nullable=False, server_default="trusted"))
    is_set = sa.text("reply_digest IS NOT NULL")
    op.create_index(
        "trajectories_by_reply", "trajectories", ["reply_digest"], sqlite_where=is_set, postgresql_where=is_set
    )
    op.execute(DISTRUST_WEB_PAGES)


def downgrade() -> None:
    op.drop_column("documents", "trust")
    op.drop_index("trajectories_by_reply", "trajectories")
    op.drop_column("trajectories", "reply_digest")
    op.drop_column("rewards", "user_id")
    op.drop_column("rewards", "key_id")
