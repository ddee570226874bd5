"""Trust travels: what is made of several rows has the least trust among them.

An episode is untrusted when text of an untrusted tool entered it, when it was shown untrusted memory, or when its
conversation contains the reply of an untrusted episode. An operator's approval lifts that, for one row at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, Select, and_, or_, union_all
from sqlmodel import Session, col, select

from memory.schema import Document, Insight, Passage, Trajectory, Trust, clean

Exchange = tuple[str, str]
"""(what the user said, what was replied)."""


class UntrustedText(str):
    """A text from an untrusted source, where trust cannot be told by who hands it over."""


def is_trusted(table: type[Trajectory] | type[Insight]) -> ColumnElement[bool]:
    """Return the property `is_trusted` of these rows as a condition."""
    return or_(table.trust == Trust.TRUSTED, col(table.approved_at).is_not(None))


def digest_exchange(tenant: str, asked: str, reply: str) -> str:
    """Return what an exchange is recognised by when a client sends its conversation again."""
    # Without white space: clients put the parts of a message together in their own ways.
    text = json.dumps([tenant, *("".join(clean(said).split()) for said in (asked, reply))])
    return hashlib.sha256(text.encode()).hexdigest()


def trust_of(
    session: Session, *, memory_ids: Sequence[str] = (), exchanges: Iterable[Exchange] = (), tenant: str = ""
) -> Trust:
    """Return the least trust among the memories shown and the exchanges that a conversation consists of."""
    digests = {digest_exchange(tenant, asked, reply) for asked, reply in exchanges}
    if not memory_ids and not digests:
        return Trust.TRUSTED
    distrusted = union_all(
        _ids_of_distrusted(Insight, col(Insight.id).in_(memory_ids)),
        _ids_of_distrusted(Trajectory, col(Trajectory.id).in_(memory_ids)),
        _ids_of_distrusted(Trajectory, col(Trajectory.reply_digest).in_(digests)),
        select(Passage.id)
        .join(Document, col(Document.id) == Passage.document_id)
        .where(col(Passage.id).in_(memory_ids), Document.trust == Trust.UNTRUSTED),
    )
    return Trust.UNTRUSTED if session.execute(distrusted.limit(1)).first() is not None else Trust.TRUSTED


def _ids_of_distrusted(table: type[Trajectory] | type[Insight], is_meant: ColumnElement[bool]) -> Select:
    return select(table.id).where(and_(is_meant, ~is_trusted(table)))
