"""What the index has yet to follow, taken in turn from each tenant: one tenant's flood does not hold up another's rows.

The outbox is read in pages, in the order of its ids, and each row's tenant is looked up once. At most `MAX_WAITING`
rows of a tenant are held here for each of the two indexes; the rest are left in the table and read again when those are
done. Rows that were removed have no tenant any more, and wait in a queue of their own.

Not for two threads. Hazard: what was taken and not written must be given up by `reset`, or it is not read again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sqlalchemy import func
from sqlmodel import Session, col, select

from memory.schema import Document, Insight, Outbox, Passage, Trajectory

PAGE = 2_000
MAX_PAGES = 50
"""Read at once; the rest of a longer outbox follows with the next batches."""
MAX_WAITING = 10_000


@dataclass(frozen=True)
class Entry:
    """One row of the outbox."""

    id: int
    collection: str
    row_id: str
    tenant: str | None


@dataclass
class FairQueue:
    """Entries by tenant; `take` goes round them."""

    by_tenant: dict[str | None, deque[Entry]] = field(default_factory=dict)
    is_cut: bool = False
    """Whether an entry was left out, to be read again."""

    def add(self, entry: Entry) -> None:
        """Hold an entry, unless enough of its tenant's wait."""
        waiting = self.by_tenant.setdefault(entry.tenant, deque())
        if len(waiting) < MAX_WAITING:
            waiting.append(entry)
        else:
            self.is_cut = True

    def take(self, num: int) -> list[Entry]:
        """Return up to `num` entries, one of each tenant, then another of each, and remove them."""
        taken: list[Entry] = []
        while self.by_tenant and len(taken) < num:
            for tenant in list(self.by_tenant)[: num - len(taken)]:
                # Taken out and put back at the end, so that the next batch begins with whoever had no turn in this one.
                waiting = self.by_tenant.pop(tenant)
                taken.append(waiting.popleft())
                if waiting:
                    self.by_tenant[tenant] = waiting
        return taken


class Backlog:
    """The outbox as two queues: rows that the word index lacks, and rows that only the index of meanings lacks."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was read, so that everything in the outbox is read again."""
        self._words, self._meanings = FairQueue(), FairQueue()
        self._last_id = 0

    def read(self, session: Session) -> None:
        """Read what came since the last time; all of it again when nothing waits, or when rows were left out."""
        queues = self._words, self._meanings
        is_empty = not any(queue.by_tenant for queue in queues)
        if is_empty or any(queue.is_cut and not queue.by_tenant for queue in queues):
            self.reset()
        for entry, is_worded in _rows_after(session, self._last_id):
            self._last_id = entry.id
            (self._meanings if is_worded else self._words).add(entry)

    def take_for_words(self, num: int) -> list[Entry]:
        return self._words.take(num)

    def take_for_meanings(self, num: int) -> list[Entry]:
        return self._meanings.take(num)

    def note_worded(self, entries: Iterable[Entry]) -> None:
        """The word index holds these by now."""
        for entry in entries:
            self._meanings.add(entry)


def _rows_after(session: Session, last_id: int) -> Iterator[tuple[Entry, bool]]:
    """Yield the rows of the outbox with a higher id, each with its tenant and whether the word index holds it."""
    for _ in range(MAX_PAGES):
        # Each row speaks of one of three tables; ids of one are never those of another.
        tenant = func.coalesce(Insight.tenant, Trajectory.tenant, Document.tenant)
        query = (
            select(Outbox.id, Outbox.collection, Outbox.row_id, tenant, Outbox.is_worded)
            .where(col(Outbox.id) > last_id)
            .outerjoin(Insight, col(Insight.id) == Outbox.row_id)
            .outerjoin(Trajectory, col(Trajectory.id) == Outbox.row_id)
            .outerjoin(Passage, col(Passage.id) == Outbox.row_id)
            .outerjoin(Document, col(Document.id) == Passage.document_id)
            .order_by(col(Outbox.id))
            .limit(PAGE)
        )
        rows = session.exec(query).all()
        for row_id, collection, of, whose, is_worded in rows:
            yield Entry(row_id, collection, of, whose), is_worded
        if len(rows) < PAGE:
            return
        last_id = rows[-1][0]
