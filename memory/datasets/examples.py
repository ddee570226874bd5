"""Imported examples: rows of training data that belong to a tenant, and teach as the key that imported them may.

Invariants: a tenant has each example once, by the digest of what is learned from it; nothing here is ever shown to
anybody in a prompt.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, or_, update
from sqlalchemy import select as sql_select
from sqlmodel import Session, col, select

from memory.errors import UnknownExample
from memory.formats.content import ExampleContent, ExampleKind, Message
from memory.schema import Example, Trust, new_id
from memory.storage.database import Database
from memory.teaching import DEFAULT_TENANT, Teacher, TeacherKind, example_teaches, teaching_keys

MAX_BATCH = 100
"""Rows of one write."""
CONTENT_FIELDS = tuple(field.name for field in dataclasses.fields(ExampleContent))


@dataclass(frozen=True)
class Origin:
    """Where examples come from, and what they are for."""

    tenant: str = ""
    key_id: str | None = None
    trust: Trust = Trust.TRUSTED
    environment: str = ""
    source: str = ""
    format: str = ""


@dataclass(frozen=True)
class AddedExamples:
    """The fate of the rows of one import."""

    num_added: int
    num_known: int
    """Rows that the tenant has already."""
    num_raised: int = 0
    """Of those, rows that may teach only since this import: the earlier one was untrusted, or its key may not teach."""
    teaches: bool = False
    """Whether weights may learn from rows of this origin."""


@dataclass(frozen=True)
class TaughtExample:
    """An example that weights may learn from, and who gave it."""

    example: Example
    teacher: Teacher

    @property
    def question(self) -> str:
        """The text of the last user's message before the first reply."""
        return question_of([*self.example.prompt, *self.example.completion])


class Examples:
    """All imported examples."""

    def __init__(self, database: Database, *, success_reward: float = 1.0) -> None:
        self._database = database
        self._success_reward = success_reward

    async def add(self, contents: Sequence[ExampleContent], origin: Origin) -> AddedExamples:
        """Store examples; those that the tenant has are not stored again. Durable on return.

        A failure of the storage may leave the first batches stored: adding all of them again completes them.
        """
        # a thread, because digests of megabytes block; batches, because the only writer serves requests in between
        rows = list((await asyncio.to_thread(_make_rows, contents, origin)).values())
        num_added = num_raised = 0
        teaches = False
        for start in range(0, len(rows), MAX_BATCH):
            batch = rows[start : start + MAX_BATCH]
            added, raised, teaches = await self._database.write(partial(_write_batch, rows=batch, origin=origin))
            num_added, num_raised = num_added + added, num_raised + raised
        return AddedExamples(num_added, len(contents) - num_added, num_raised, teaches)

    def get(self, example_id: str, *, tenant: str | None = None) -> Example:
        """Return one example. Raises: UnknownExample, also for one of another tenant."""
        with self._database.read() as session:
            return _require(session, example_id, tenant)

    def select(
        self,
        *,
        limit: int = 50,
        before_id: str | None = None,
        kind: ExampleKind | None = None,
        environment: str | None = None,
        source: str | None = None,
        tenant: str = "",
    ) -> list[Example]:
        """Return examples, newest first; pass the last id as `before_id` for the next page."""
        query = select(Example).where(*_conditions(tenant, kind, environment, source))
        if before_id is not None:
            query = query.where(col(Example.id) < before_id)
        with self._database.read() as session:
            return list(session.exec(query.order_by(col(Example.id).desc()).limit(limit)))

    def read_page(
        self,
        *,
        after_id: str = "",
        limit: int,
        kind: ExampleKind | None = None,
        environment: str | None = None,
        tenant: str = "",
    ) -> list[Example]:
        """Return the next examples behind `after_id`, oldest first."""
        query = select(Example).where(*_conditions(tenant, kind, environment, None), col(Example.id) > after_id)
        with self._database.read() as session:
            return list(session.exec(query.order_by(col(Example.id)).limit(limit)))

    def count(self, *, tenant: str = "") -> list[tuple[ExampleKind, str, str, int]]:
        """Return (kind, environment, source, number) of a tenant's examples, sorted."""
        groups = (col(Example.kind), col(Example.environment), col(Example.source))
        query = sql_select(*groups, func.count()).where(col(Example.tenant) == tenant).group_by(*groups)
        with self._database.read() as session:
            return sorted((kind, environment, source, num) for kind, environment, source, num in session.execute(query))

    async def delete(self, example_id: str, *, tenant: str | None = None) -> None:
        """Delete one example. Raises: UnknownExample."""

        def write(session: Session) -> None:
            session.delete(_require(session, example_id, tenant))

        await self._database.write(write)

    async def delete_source(self, source: str, *, tenant: str = "") -> int:
        """Delete all examples of one source; return how many there were."""

        def write(session: Session) -> int:
            conditions = _conditions(tenant, None, None, source)
            num = session.scalar(sql_select(func.count()).select_from(Example).where(*conditions)) or 0
            session.execute(delete(Example).where(*conditions))
            return num

        return await self._database.write(write)

    def learnable(self, kind: ExampleKind, *, environments: Collection[str], limit: int) -> list[TaughtExample]:
        """Return examples of all tenants that weights may learn from, oldest first; of more than `limit`, the newest of
        each key in turn. `""` among the environments stands for live traffic. Reads many rows: call it in a thread.
        """
        # rank within a key first: an import of thousands must not push out what others gave
        rank = func.row_number().over(
            partition_by=(col(Example.tenant), col(Example.key_id)), order_by=col(Example.id).desc()
        )
        with self._database.read() as session:
            query = sql_select(Example).where(*self._learnable_conditions(session, kind, environments))
            rows = session.scalars(query.order_by(rank, col(Example.id).desc()).limit(limit)).all()
        return [
            TaughtExample(row, Teacher(row.tenant, row.key_id, kind=TeacherKind.IMPORT))
            for row in sorted(rows, key=lambda row: row.id)
        ]

    def count_learnable(self, kind: ExampleKind, *, environments: Collection[str], is_good: bool | None = None) -> int:
        """Return how many examples weights may learn from; of labels, only the good or the bad ones with `is_good`."""
        with self._database.read() as session:
            conditions = self._learnable_conditions(session, kind, environments)
            if is_good is not None:
                conditions.append(col(Example.is_good) == is_good)
            return session.scalar(sql_select(func.count()).select_from(Example).where(*conditions)) or 0

    def count_without_teacher(self, *, environments: Collection[str]) -> int:
        """Return how many examples of these environments may not teach, because of their key."""
        with self._database.read() as session:
            conditions = (col(Example.environment).in_(environments), ~example_teaches(teaching_keys(session)))
            return session.scalar(sql_select(func.count()).select_from(Example).where(*conditions)) or 0

    def _learnable_conditions(
        self, session: Session, kind: ExampleKind, environments: Collection[str]
    ) -> list[ColumnElement[bool]]:
        return [
            col(Example.kind) == kind,
            col(Example.environment).in_(environments),
            col(Example.trust) == Trust.TRUSTED,
            # a trajectory that its file says has failed is no demonstration
            or_(col(Example.reward).is_(None), col(Example.reward) >= self._success_reward),
            example_teaches(teaching_keys(session)),
        ]


def digest_content(content: ExampleContent, environment: str) -> str:
    """Return the SHA-256 of what is learned from an example, and where."""
    parts = [
        *(environment, content.kind, content.prompt, content.completion, content.rejected),
        *(content.is_good, content.reward, content.tools),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_example(content: ExampleContent, origin: Origin, digest: str) -> Example:
    """Return the row of an example."""
    fields = {name: getattr(content, name) for name in CONTENT_FIELDS}
    return Example(id=new_id("exm"), digest=digest, **fields, **vars(origin))


def _make_rows(contents: Sequence[ExampleContent], origin: Origin) -> dict[str, dict[str, Any]]:
    """Return the columns of each different example, by digest."""
    by_digest = {digest_content(content, origin.environment): content for content in contents}
    return {digest: vars(make_example(content, origin, digest)) for digest, content in by_digest.items()}


def _write_batch(session: Session, *, rows: Sequence[dict[str, Any]], origin: Origin) -> tuple[int, int, bool]:
    """Insert the rows that are not there; return their number, that of raised ones, and whether rows of this origin
    teach."""
    columns = (col(Example.digest), col(Example.id), col(Example.trust), col(Example.key_id))
    query = sql_select(*columns).where(
        col(Example.tenant) == origin.tenant, col(Example.digest).in_([row["digest"] for row in rows])
    )
    known = {row.digest: row for row in session.execute(query)}
    new = [{name: row[name] for name in Example.model_fields} for row in rows if row["digest"] not in known]
    if new:
        session.execute(insert(Example), new)
    keys = teaching_keys(session)
    teaches = origin.trust is Trust.TRUSTED and _may_teach(origin.tenant, origin.key_id, keys)
    raised = [
        row.id
        for row in known.values()
        if teaches and not (row.trust is Trust.TRUSTED and _may_teach(origin.tenant, row.key_id, keys))
    ]
    if raised:
        values = {"trust": Trust.TRUSTED, "key_id": origin.key_id}
        session.execute(update(Example).where(col(Example.id).in_(raised)).values(**values))
    return len(new), len(raised), teaches


def content_of(example: Example) -> ExampleContent:
    """Return the content of a row."""
    return ExampleContent(**{name: getattr(example, name) for name in CONTENT_FIELDS})


def user_texts_of(example: Example) -> list[str]:
    """Return the texts of all users' messages."""
    return [message["content"] for message in (*example.prompt, *example.completion) if message["role"] == "user"]


def question_of(messages: Sequence[Message]) -> str:
    """Return the text of the last user's message before the first reply; empty where there is none."""
    question = ""
    for message in messages:
        if message["role"] == "assistant":
            break
        if message["role"] == "user":
            question = message["content"]
    return question


def _may_teach(tenant: str, key_id: str | None, keys: Collection[str]) -> bool:
    """As `memory.teaching.example_teaches`, for one origin."""
    return key_id in keys if key_id is not None else tenant == DEFAULT_TENANT


def _require(session: Session, example_id: str, tenant: str | None) -> Example:
    example = session.get(Example, example_id)
    # one error for both: another tenant's id must not be told from an unknown one
    if example is None or tenant not in (None, example.tenant):
        raise UnknownExample(f"no example has the id {example_id!r}: list them to see which exist")
    return example


def _conditions(
    tenant: str, kind: ExampleKind | None, environment: str | None, source: str | None
) -> list[ColumnElement[bool]]:
    conditions = [col(Example.tenant) == tenant]
    for column, wanted in ((Example.kind, kind), (Example.environment, environment), (Example.source, source)):
        if wanted is not None:
            conditions.append(col(column) == wanted)
    return conditions
