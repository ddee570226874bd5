"""Whose words a row holds (the person and the key), whether a client shares them, and how far they may be trusted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

NAMES = {"uq": "uq_%(table_name)s_%(column_0_name)s"}  # SQLite's constraints have no names of their own


def upgrade() -> None:
    for table in ("trajectories", "feedback"):
        op.add_column(table, sa.Column("user_id", sa.String(), nullable=False, server_default=""))
        op.add_column(table, sa.Column("key_id", sa.String(), nullable=True))
    op.add_column("trajectories", sa.Column("is_shared", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("trajectories", _trust())
    op.create_index("trajectories_by_user", "trajectories", ["tenant", "user_id"])
    with op.batch_alter_table("insights", naming_convention=NAMES) as insights:
        insights.add_column(sa.Column("user_id", sa.String(), nullable=False, server_default=""))
        insights.add_column(_trust())
        insights.drop_constraint("uq_insights_tenant", type_="unique")
        insights.create_unique_constraint("uq_insights_tenant", ["tenant", "user_id", "environment", "kind", "text"])


def downgrade() -> None:
    op.execute("DELETE FROM insights WHERE user_id <> ''")
    with op.batch_alter_table("insights", naming_convention=NAMES) as insights:
        insights.drop_constraint("uq_insights_tenant", type_="unique")
        insights.drop_column("trust")
        insights.drop_column("user_id")
        insights.create_unique_constraint("uq_insights_tenant", ["tenant", "environment", "kind", "text"])
    op.drop_index("trajectories_by_user", "trajectories")
    op.drop_column("trajectories", "trust")
    op.drop_column("trajectories", "is_shared")
    for table in ("trajectories", "feedback"):
        op.drop_column(table, "key_id")
        op.drop_column(table, "user_id")


def _trust() -> sa.Column:
    return sa.Column("trust", sa.String(length=16), nullable=False, server_default="trusted")
