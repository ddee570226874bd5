"""What lies below both homes of rows: pools of connections, and statements that are compiled once.

This module refuses to know which home it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Dialect, Executable

MAX_READERS = 16
KEPT_READERS = 4  # connections that stay open when nobody reads


def pool_of(num_connections: int) -> dict[str, int]:
    kept = min(num_connections, KEPT_READERS)
    return {"pool_size": kept, "max_overflow": num_connections - kept}


class Compiled:
    """A statement as the driver takes it."""

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.sql = compiled.string
        self.names = [name for name, parameter in compiled.binds.items() if parameter.required]
        given = {
            name: parameter.effective_value for name, parameter in compiled.binds.items() if not parameter.required
        }
        order = compiled.positiontup or []
        self._template = [given.get(name) for name in order]
        self._places = [(place, name) for place, name in enumerate(order) if name not in given]
        self._processed = []
        """Place, how to make the driver's value of ours, whether None is to be made one too."""
        for place, name in enumerate(order):
            kind = compiled.binds[name].type
            process = kind.dialect_impl(dialect).bind_processor(dialect)
            if process is not None and name in given:
                self._template[place] = process(given[name])
            elif process is not None:
                self._processed.append((place, process, kind.should_evaluate_none))

    def bind(self, values: Mapping[str, Any]) -> list[Any]:
        """Return what stands in the statement's places, in their order."""
        row = self._template.copy()
        for place, name in self._places:
            row[place] = values[name]
        for place, process, takes_none in self._processed:
            if takes_none or row[place] is not None:
                row[place] = process(row[place])
        return row


class StatementCache:
    """Statements by themselves: each is compiled when it first comes."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._compiled: dict[Executable, Compiled] = {}

    def get(self, statement: Executable) -> Compiled:
        if statement not in self._compiled:
            self._compiled[statement] = Compiled(statement, self._dialect)
        return self._compiled[statement]
