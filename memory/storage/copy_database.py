"""Copies all rows from one database to another, for a data directory that has outgrown its SQLite file.

Invariant: everything is copied, or nothing; the source is only read.
"""

from __future__ import annotations

from sqlalchemy import Table, func, insert, select, text
from sqlmodel import Session, SQLModel

from memory.storage.database import Database

MAX_BATCH = 500


def copy_rows(source: Database, target: Database) -> dict[str, int]:
    """Copy every row into an empty database, in one transaction; return the number of rows by table. Blocks.

    Raises: ValueError when the target has rows already; StorageError.
    """

    def write(session: Session) -> dict[str, int]:
        with source.read() as reading:
            # sorted_tables: a table comes after those that its foreign keys refer to
            return {table.name: _copy(table, reading, session, target) for table in SQLModel.metadata.sorted_tables}

    return target.write_sync(write)


def _copy(table: Table, reading: Session, session: Session, target: Database) -> int:
    if session.execute(select(table).limit(1)).first() is not None:
        raise ValueError(f"the database {target.location} holds {table.name} already: copy into an empty one")
    num_rows = 0
    # In the order of their keys: policies and activations refer to earlier ones.
    ordered = select(table).order_by(*table.primary_key).execution_options(yield_per=MAX_BATCH)
    for rows in reading.execute(ordered).mappings().partitions():
        session.execute(insert(table), [dict(row) for row in rows])
        num_rows += len(rows)
    key = table.autoincrement_column
    if num_rows and key is not None and target.kind == "postgresql":  # its sequence did not advance with the copies
        sequence = func.pg_get_serial_sequence(text(f"'{table.name}'"), text(f"'{key.name}'"))
        session.execute(select(func.setval(sequence, select(func.max(key)).scalar_subquery())))
    return num_rows
