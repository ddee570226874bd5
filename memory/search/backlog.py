"""The outbox in memory, drained round-robin over the tenants: a flood of one tenant's rows delays no other tenant.

The outbox is read in pages, in the order of its ids, and each row's tenant is looked up once. At most `MAX_WAITING`
rows of a tenant are queued here for each of the two indexes; the rest stay in the table and are read again once those
are done. Removed rows have no tenant any more and wait in a queue of their own.

Not thread-safe. Hazard: entries that were taken but not written are lost until `reset` is called.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sqlalchemy import func, select
from sqlmodel import Session, col

from memory.schema import Document, Insight, Outbox, Passage, Trajectory

PAGE = 2_000
MAX_PAGES = 50
"""Pages of one read; the rest of a longer outbox follows with the next batches."""
MAX_WAITING = 10_000


@dataclass(frozen=True)
class OutboxEntry:
    """One row of the outbox, with the tenant of the row that it names."""

    id: int
    collection: str
    row_id: str
    tenant: str | None


@dataclass
class FairQueue:
    """Entries by tenant; `take` serves the tenants round-robin."""

    by_tenant: dict[str | None, deque[OutboxEntry]] = field(default_factory=dict)
    has_overflowed: bool = False
    """Whether an entry was left out, to be read again."""

    def add(self, entry: OutboxEntry) -> None:
        """Queue an entry, unless `MAX_WAITING` entries of its tenant wait already."""
        waiting = self.by_tenant.setdefault(entry.tenant, deque())
        if len(waiting) < MAX_WAITING:
            waiting.append(entry)
        else:
            self.has_overflowed = True

    def take(self, num: int) -> list[OutboxEntry]:
        """Remove and return up to `num` entries: one of each tenant, then another of each."""
        taken: list[OutboxEntry] = []
        while self.by_tenant and len(taken) < num:
            for tenant in list(self.by_tenant)[: num - len(taken)]:
                # Dicts keep insertion order: a tenant that was served goes to the end, so the next batch begins with
                # the tenants that this one did not reach.
                waiting = self.by_tenant.pop(tenant)
                taken.append(waiting.popleft())
                if waiting:
                    self.by_tenant[tenant] = waiting
        return taken


class Backlog:
    """The outbox as two queues: rows that the text index lacks, and rows that only the vector index lacks."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop the queues, so that the whole outbox is read again."""
        self._for_text, self._for_vectors = FairQueue(), FairQueue()
        self._last_id = 0

    def read(self, session: Session) -> None:
        """Read the rows added since the last call; all rows when nothing waits, or when rows were left out."""
        queues = self._for_text, self._for_vectors
        is_empty = not any(queue.by_tenant for queue in queues)
        if is_empty or any(queue.has_overflowed and not queue.by_tenant for queue in queues):
            self.reset()
        for entry, is_in_text_index in _rows_after(session, self._last_id):
            self._last_id = entry.id
            (self._for_vectors if is_in_text_index else self._for_text).add(entry)

    def take_for_text_index(self, num: int) -> list[OutboxEntry]:
        """Remove and return up to `num` entries that the text index lacks."""
        return self._for_text.take(num)

    def take_for_vector_index(self, num: int) -> list[OutboxEntry]:
        """Remove and return up to `num` entries that only the vector index lacks."""
        return self._for_vectors.take(num)

    def queue_for_vector_index(self, entries: Iterable[OutboxEntry]) -> None:
        """Queue entries that the text index has taken over."""
        for entry in entries:
            self._for_vectors.add(entry)


def _rows_after(session: Session, last_id: int) -> Iterator[tuple[OutboxEntry, bool]]:
    """Yield the outbox rows with a higher id, each with whether the text index holds it already."""
    for _ in range(MAX_PAGES):
        # An outbox row names a row of one of three tables; their ids have different prefixes and never collide.
        tenant = func.coalesce(Insight.tenant, Trajectory.tenant, Document.tenant)
        query = (
            select(col(Outbox.id), col(Outbox.collection), col(Outbox.row_id), tenant, col(Outbox.is_in_text_index))
            .where(col(Outbox.id) > last_id)
            .outerjoin(Insight, col(Insight.id) == Outbox.row_id)
            .outerjoin(Trajectory, col(Trajectory.id) == Outbox.row_id)
            .outerjoin(Passage, col(Passage.id) == Outbox.row_id)
            .outerjoin(Document, col(Document.id) == Passage.document_id)
            .order_by(col(Outbox.id))
            .limit(PAGE)
        )
        rows = session.execute(query).all()
        for outbox_id, collection, row_id, owner, is_in_text_index in rows:
            yield OutboxEntry(outbox_id, collection, row_id, owner), is_in_text_index
        if len(rows) < PAGE:
            return
        last_id = rows[-1][0]
