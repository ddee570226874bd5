"""What can be found, and as what: the rows behind each collection of the index.

This module refuses to know how an index works. Invariant: what is searchable is a function of the rows alone, so
looking at a row again always heals whatever the index missed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlmodel import Session, col, select

from memory.records.trajectories import Trajectories
from memory.schema import Document, Insight, Passage, Trajectory

COLLECTIONS = ("insights", "exemplars", "passages")
PLACE = ("tenant", "user_id", "environment", "kind")  # what a question may be narrowed to
Place = tuple[str, str, str, str]
PAGED = {"yield_per": 1000}
MAX_IDS = 500  # of one query: SQLite bounds its variables


@dataclass(frozen=True)
class IndexedRow:
    """One row as the index sees it. Empty strings where a row has no environment, kind or task, for the default tenant,
    and for what is shown to all of a tenant. A row's `user_id` may change; the rest of its place never does."""

    row_id: str
    text: str
    environment: str = ""
    kind: str = ""
    task: str = ""
    tenant: str = ""
    user_id: str = ""
    """Who is shown it: the scope."""

    @property
    def place(self) -> Place:
        """The values of `PLACE`."""
        return self.tenant, self.user_id, self.environment, self.kind

    @property
    def digest(self) -> str:
        """What changes when anything the index holds of this row changes."""
        told = "\x00".join((self.text, self.environment, self.kind, self.task, self.tenant, self.user_id))
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class IndexedRows:
    """Reads what can be found out of the rows."""

    def __init__(self, trajectories: Trajectories) -> None:
        self._trajectories = trajectories
        self._insight_scope = trajectories.scopes.of_insight()

    def load(self, session: Session, collection: str, ids: Iterable[str]) -> list[IndexedRow]:
        """Return those of the rows that are searchable now; the others are to be forgotten."""
        ids, found = list(ids), []
        for start in range(0, len(ids), MAX_IDS):
            found += self._query(session, collection, ids[start : start + MAX_IDS])
        return found

    def load_all(self, session: Session, collection: str) -> Iterator[IndexedRow]:
        """Yield everything searchable of one collection, a page of rows in memory at a time.

        Nothing is read before the first is asked for: SQLite drops no table while one is read.
        """
        return self._query(session, collection, None)

    def _query(self, session: Session, collection: str, ids: list[str] | None) -> Iterator[IndexedRow]:
        match collection:
            case "insights":
                query = select(Insight, self._insight_scope).where(
                    col(Insight.removed_at).is_(None), self._insight_scope.is_not(None)
                )
                rows = session.exec(_among(query, Insight.id, ids), execution_options=PAGED)
                yield from (_of_insight(*row) for row in rows)
            case "exemplars":
                query = _among(self._trajectories.exemplary(), Trajectory.id, ids)
                rows = session.exec(query, execution_options=PAGED)
                yield from (_of_exemplar(*row) for row in rows)
            case "passages":
                query = select(Passage, Document).join(Document, col(Document.id) == Passage.document_id)
                query = query.where(col(Document.is_whole))
                rows = session.exec(_among(query, Passage.id, ids), execution_options=PAGED)
                yield from (_of_passage(*row) for row in rows)
            case _:
                raise ValueError(f"no collection is called {collection!r}: choose among {COLLECTIONS!r}")


def _among(query, column, ids: list[str] | None):
    return query if ids is None else query.where(col(column).in_(ids))


def _of_insight(insight: Insight, scope: str) -> IndexedRow:
    place = (insight.environment, insight.kind)
    return IndexedRow(insight.id, insight.text, *place, tenant=insight.tenant, user_id=scope)


def _of_exemplar(trajectory: Trajectory, scope: str) -> IndexedRow:
    text = trajectory.task_text or _last_request(trajectory) or trajectory.kind
    place = (trajectory.environment or "", trajectory.kind, trajectory.task or "")
    return IndexedRow(trajectory.id, text, *place, tenant=trajectory.tenant, user_id=scope)


def _of_passage(passage: Passage, document: Document) -> IndexedRow:
    return IndexedRow(passage.id, f"{document.title}: {passage.text}", tenant=document.tenant)


def _last_request(trajectory: Trajectory) -> str:
    requests = [message.get("content") for message in trajectory.opening if message.get("role") == "user"]
    return requests[-1] if requests and isinstance(requests[-1], str) else ""
