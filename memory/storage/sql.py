"""Shared parts of both dialects: sizes of connection pools, and a cache of compiled statements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from sqlalchemy import ClauseElement, Dialect, Executable

MAX_READERS = 16
KEPT_READERS = 4  # connections that stay open while idle


def pool_of(num_connections: int) -> dict[str, int]:
    """Return SQLAlchemy's pool settings for at most `num_connections` connections."""
    kept = min(num_connections, KEPT_READERS)
    return {"pool_size": kept, "max_overflow": num_connections - kept}


class Compiled:
    """A statement in the driver's form: SQL text and positional values."""

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        compiled: Any = cast(ClauseElement, statement).compile(dialect=dialect)
        self.sql = compiled.string
        self.names = [name for name, parameter in compiled.binds.items() if parameter.required]
        defaults = {
            name: parameter.effective_value for name, parameter in compiled.binds.items() if not parameter.required
        }
        order = compiled.positiontup or []
        self._template = [defaults.get(name) for name in order]
        self._slots = [(slot, name) for slot, name in enumerate(order) if name not in defaults]
        self._processors: list[tuple[int, Callable[[Any], Any], bool]] = []
        """(slot, conversion to the driver's value, whether it also converts None)."""
        for slot, name in enumerate(order):
            kind = compiled.binds[name].type
            process = kind.dialect_impl(dialect).bind_processor(dialect)
            if process is not None and name in defaults:
                self._template[slot] = process(defaults[name])
            elif process is not None:
                self._processors.append((slot, process, kind.should_evaluate_none))

    def bind(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the driver's positional values for a row."""
        row = self._template.copy()
        for slot, name in self._slots:
            row[slot] = values[name]
        for slot, process, converts_none in self._processors:
            if converts_none or row[slot] is not None:
                row[slot] = process(row[slot])
        return row


class StatementCache:
    """Compiled statements of one dialect; each is compiled at its first use."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._compiled: dict[Executable, Compiled] = {}

    def get(self, statement: Executable) -> Compiled:
        """Return the compiled form of a statement."""
        # by identity, without a limit: only statements that are built once may come here. No lock: two threads may
        # compile one twice, to the same result
        if statement not in self._compiled:
            self._compiled[statement] = Compiled(statement, self._dialect)
        return self._compiled[statement]
