"""Propagates trust: a row made of several others has the least trust among them.

An episode is untrusted when text of an untrusted tool entered it, when it was shown untrusted memory, or when its
conversation contains the reply of an untrusted episode, also of one that waits for its client. An operator's approval
lifts that for a single row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, Select, and_, or_, union_all
from sqlmodel import Session, col, select

from memory.schema import Document, Insight, Passage, Step, Trajectory, Trust, clean

Exchange = tuple[str, str]
"""(user message, reply)."""


class UntrustedText(str):
    """A text from an untrusted source, marked as such where its carrier is trusted."""


def is_trusted(table: type[Trajectory] | type[Insight]) -> ColumnElement[bool]:
    """Return the property `is_trusted` of a table's rows as an SQL condition."""
    return or_(col(table.trust) == Trust.TRUSTED, col(table.approved_at).is_not(None))


def digest_exchange(tenant: str, request: str, reply: str) -> str:
    """Return the digest that identifies an exchange when a client sends its conversation again."""
    # White space is ignored: clients join the parts of a message in different ways.
    text = json.dumps([tenant, *("".join(clean(part).split()) for part in (request, reply))])
    return hashlib.sha256(text.encode()).hexdigest()


def trust_of(
    session: Session,
    *,
    memory_ids: Sequence[str] = (),
    exchanges: Iterable[Exchange] = (),
    handover_digest: str | None = None,
    tenant: str = "",
) -> Trust:
    """Return the least trust among the memories shown, the exchanges of a conversation, and its hand-over."""
    digests = {digest_exchange(tenant, request, reply) for request, reply in exchanges}
    if not memory_ids and not digests and handover_digest is None:
        return Trust.TRUSTED
    untrusted = [
        _ids_of_untrusted(Insight, col(Insight.id).in_(memory_ids)),
        _ids_of_untrusted(Trajectory, col(Trajectory.id).in_(memory_ids)),
        _ids_of_untrusted(Trajectory, col(Trajectory.reply_digest).in_(digests)),
        select(Passage.id)
        .join(Document, col(Document.id) == Passage.document_id)
        .where(col(Passage.id).in_(memory_ids), Document.trust == Trust.UNTRUSTED),
    ]
    if handover_digest is not None:
        handovers = select(Step.trajectory_id).where(Step.handover_digest == handover_digest)
        is_handed_over = and_(col(Trajectory.tenant) == tenant, col(Trajectory.id).in_(handovers))
        untrusted.append(_ids_of_untrusted(Trajectory, is_handed_over))
    # One row is enough: trust never rises by adding sources.
    return Trust.UNTRUSTED if session.execute(union_all(*untrusted).limit(1)).first() is not None else Trust.TRUSTED


def _ids_of_untrusted(table: type[Trajectory] | type[Insight], condition: ColumnElement[bool]) -> Select:
    return select(table.id).where(and_(condition, ~is_trusted(table)))
