"""The rows behind each collection of the index, and the form in which the index holds and finds them.

Invariant: the searchable form is a function of the rows alone, so reading a row again always repairs an index that
missed a change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy import Select, SQLColumnExpression
from sqlmodel import Session, col, select

from memory.records.trajectories import Trajectories
from memory.schema import Document, Insight, Passage, Trajectory
from memory.scopes import EVERYBODY

COLLECTIONS = ("insights", "exemplars", "passages")
PARTITION_COLUMNS = ("tenant", "user_id", "environment", "kind")  # a query may be narrowed to these
IndexPartition = tuple[str, str, str, str]
"""The values of `PARTITION_COLUMNS`: rows with the same four values are searched together."""
PAGED = {"yield_per": 1000}
MAX_IDS = 500  # of one SQL query: SQLite bounds its variables


@dataclass(frozen=True)
class IndexQuery:
    """One search. `MemoryIndex` makes it; the text index and the vector index read it."""

    collection: str
    text: str
    where: Mapping[str, str]
    """Wanted values, by partition column. `user_id` admits this person's rows and everybody's."""
    num: int = 10
    """Most rows to return."""
    exclude_task: str | None = None
    """Rows of this task are left out."""

    @property
    def names_person(self) -> bool:
        """Whether rows of one person may be found besides those of the whole tenant."""
        return self.where.get("user_id", EVERYBODY) != EVERYBODY


@dataclass(frozen=True)
class IndexedRow:
    """One row in the form that the index holds.

    Fields are empty where a row has no environment, kind or task, for the default tenant, and for rows that the whole
    tenant is shown. A row's `user_id` may change; the rest of its partition never does.
    """

    row_id: str
    text: str
    environment: str = ""
    kind: str = ""
    task: str = ""
    tenant: str = ""
    user_id: str = ""
    """The scope: the person who is shown the row."""

    @property
    def partition(self) -> IndexPartition:
        """The values of `PARTITION_COLUMNS`."""
        return self.tenant, self.user_id, self.environment, self.kind

    @property
    def digest(self) -> str:
        """A digest of all fields that the index holds: it differs as soon as one of them changes."""
        # a field that is missing here changes unnoticed by `_reconcile`; a change of this formula has all rows indexed
        # again
        fields = "\x00".join((self.text, self.environment, self.kind, self.task, self.tenant, self.user_id))
        return hashlib.sha256(fields.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class IndexedRows:
    """Reads searchable rows from the database."""

    def __init__(self, trajectories: Trajectories) -> None:
        self._trajectories = trajectories
        self._insight_scope = trajectories.scopes.of_insight()

    def load(self, session: Session, collection: str, ids: Iterable[str]) -> list[IndexedRow]:
        """Return those of the rows that are searchable now; the index must forget the others."""
        ids = list(ids)
        rows: list[IndexedRow] = []
        for start in range(0, len(ids), MAX_IDS):
            rows += self._query(session, collection, ids[start : start + MAX_IDS])
        return rows

    def load_all(self, session: Session, collection: str) -> Iterator[IndexedRow]:
        """Yield every searchable row of one collection, a page of rows in memory at a time.

        Nothing is read before the first row is consumed: SQLite cannot drop a table while a query reads one.
        """
        return self._query(session, collection, None)

    def _query(self, session: Session, collection: str, ids: list[str] | None) -> Iterator[IndexedRow]:
        match collection:
            case "insights":
                query = select(Insight, self._insight_scope).where(
                    col(Insight.removed_at).is_(None), self._insight_scope.is_not(None)
                )
                rows = session.execute(_narrow(query, col(Insight.id), ids), execution_options=PAGED)
                yield from (_of_insight(*row) for row in rows)
            case "exemplars":
                query = _narrow(self._trajectories.exemplary(), col(Trajectory.id), ids)
                rows = session.execute(query, execution_options=PAGED)
                yield from (_of_exemplar(*row) for row in rows)
            case "passages":
                query = select(Passage, Document).join(Document, col(Document.id) == Passage.document_id)
                query = query.where(col(Document.is_whole))
                rows = session.execute(_narrow(query, col(Passage.id), ids), execution_options=PAGED)
                yield from (_of_passage(*row) for row in rows)
            case _:
                raise ValueError(f"no collection is called {collection!r}: choose among {COLLECTIONS!r}")


def _narrow(query: Select, column: SQLColumnExpression[str], ids: list[str] | None) -> Select:
    return query if ids is None else query.where(column.in_(ids))


def _of_insight(insight: Insight, scope: str) -> IndexedRow:
    return IndexedRow(insight.id, insight.text, insight.environment, insight.kind, tenant=insight.tenant, user_id=scope)


def _of_exemplar(trajectory: Trajectory, scope: str) -> IndexedRow:
    return IndexedRow(
        trajectory.id,
        trajectory.task_text or _last_request(trajectory) or trajectory.kind,
        trajectory.environment or "",
        trajectory.kind,
        trajectory.task or "",
        tenant=trajectory.tenant,
        user_id=scope,
    )


def _of_passage(passage: Passage, document: Document) -> IndexedRow:
    return IndexedRow(passage.id, f"{document.title}: {passage.text}", tenant=document.tenant)


def _last_request(trajectory: Trajectory) -> str:
    requests = [message.get("content") for message in trajectory.opening if message.get("role") == "user"]
    return requests[-1] if requests and isinstance(requests[-1], str) else ""
