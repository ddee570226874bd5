"""Alembic's environment, run for every upgrade in the connection and transaction that `upgrade` opened.

Invariant: a revision names plain column types only, never those of `memory.schema`, so that later schemas cannot change
it.
"""

from __future__ import annotations

from typing import Literal

from alembic import context
from sqlalchemy import Boolean, Enum, Float, Integer, LargeBinary, String
from sqlalchemy.types import TypeDecorator
from sqlmodel import SQLModel

import memory.schema  # noqa: F401  (fills the metadata)


def render_plainly(kind: str, item: object, _context: object) -> str | Literal[False]:
    """Return the source text of the plain type behind a column type; False leaves the rendering to Alembic."""
    if kind != "type" or isinstance(item, Boolean | Integer | Float):
        return False
    plain = item.impl_instance if isinstance(item, TypeDecorator) else item
    if isinstance(plain, Enum):
        return f"sa.String(length={plain.length})"
    if isinstance(plain, LargeBinary):
        return "sa.LargeBinary()"
    return "sa.String()" if isinstance(plain, String) else f"sa.{type(plain).__name__}()"


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
    render_item=render_plainly,
    transactional_ddl=True,
)
context.run_migrations()
