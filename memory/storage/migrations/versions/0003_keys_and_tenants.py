"""API keys, and a tenant on everything that belongs to one. What is there belongs to the default tenant."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# SQLite's constraints have no names; Alembic finds them by this rule, and PostgreSQL names them by its own.
NAMES = {"uq": "uq_%(table_name)s_%(column_0_name)s", "pk": "pk_%(table_name)s"}


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=True),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True),
        sa.Column("tokens_per_minute", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("revoked_at", sa.DateTime(), nullable=True),
        sa.Column("last_used_at", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("digest"),
    )
    for table in ("trajectories", "responses"):
        op.add_column(table, _tenant())
    op.create_index("trajectories_by_tenant", "trajectories", ["tenant", "id"])
    with op.batch_alter_table("insights", naming_convention=NAMES) as insights:
        insights.add_column(_tenant())
        insights.drop_constraint(_unique("insights", "environment", "environment_kind_text"), type_="unique")
        insights.create_unique_constraint("uq_insights_tenant", ["tenant", "environment", "kind", "text"])
    _set_passages_aside()
    with op.batch_alter_table("documents", naming_convention=NAMES) as documents:
        documents.add_column(_tenant())
        documents.drop_constraint(_unique("documents", "title", "title"), type_="unique")
        documents.create_unique_constraint("uq_documents_tenant", ["tenant", "title"])
    _bring_passages_back()
    with op.batch_alter_table("feedback", naming_convention=NAMES) as feedback:
        feedback.add_column(_tenant())
        feedback.drop_constraint(_primary("feedback"), type_="primary")
        feedback.create_primary_key("pk_feedback", ["tenant", "id"])
    _forget_words()


def downgrade() -> None:
    """Only the default tenant's rows can go back: nothing older keeps the others' apart."""
    steps_of_others = "SELECT id FROM trajectories WHERE tenant <> ''"
    for table in ("feedback", "rewards", "responses", "steps"):
        op.execute(f"DELETE FROM {table} WHERE trajectory_id IN ({steps_of_others})")
    op.execute("DELETE FROM passages WHERE document_id IN (SELECT id FROM documents WHERE tenant <> '')")
    for table in ("trajectories", "documents", "insights"):
        op.execute(f"DELETE FROM {table} WHERE tenant <> ''")
    with op.batch_alter_table("feedback") as feedback:
        feedback.drop_constraint("pk_feedback", type_="primary")
        feedback.drop_column("tenant")
        feedback.create_primary_key("pk_feedback", ["id"])
    _set_passages_aside()
    with op.batch_alter_table("documents") as documents:
        documents.drop_constraint("uq_documents_tenant", type_="unique")
        documents.drop_column("tenant")
        documents.create_unique_constraint(_unique("documents", "title", "title"), ["title"])
    _bring_passages_back()
    with op.batch_alter_table("insights") as insights:
        insights.drop_constraint("uq_insights_tenant", type_="unique")
        insights.drop_column("tenant")
        name = _unique("insights", "environment", "environment_kind_text")
        insights.create_unique_constraint(name, ["environment", "kind", "text"])
    op.drop_index("trajectories_by_tenant", "trajectories")
    for table in ("trajectories", "responses"):
        op.drop_column(table, "tenant")
    op.drop_table("api_keys")
    _forget_words()


def _tenant() -> sa.Column:
    return sa.Column("tenant", sa.String(), nullable=False, server_default="")


def _is_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _unique(table: str, first_column: str, columns: str) -> str:
    return f"uq_{table}_{first_column}" if _is_sqlite() else f"{table}_{columns}_key"


def _primary(table: str) -> str:
    return f"pk_{table}" if _is_sqlite() else f"{table}_pkey"


def _set_passages_aside() -> None:
    # SQLite changes a table by making it anew; what points at it would forbid that, and keys of other tables can't be
    # switched off within a transaction.
    if _is_sqlite():
        op.execute("CREATE TABLE passages_aside AS SELECT * FROM passages")
        op.execute("DELETE FROM passages")


def _bring_passages_back() -> None:
    if _is_sqlite():
        op.execute("INSERT INTO passages SELECT * FROM passages_aside")
        op.execute("DROP TABLE passages_aside")


def _forget_words() -> None:
    """The word index has another form from here on; it is made anew from the rows."""
    for table in ("words", "word_entries"):
        op.execute(f"DROP TABLE IF EXISTS {table}")
