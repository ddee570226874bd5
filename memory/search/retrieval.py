"""Builds the memory segment of a prompt: insights, solved tasks and passages that fit a request, within a token budget.

All stored text is data: chat markers and the segment's own tags in it are broken by spaces, so that no memory can speak
as the system.

Invariants: the segment shows nothing of another tenant or another person, even while an index is behind, because every
row is checked in the database again; never an exemplar of the task or the conversation at hand; never more than the
budget. Hazard: models were trained on the layout of the segment, to the character.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy import bindparam
from sqlmodel import col

from memory.chat_marks import neutralise
from memory.config import MemoryConfig
from memory.errors import StorageError
from memory.records.documents import read_passages
from memory.records.exemplars import read_exemplar
from memory.records.insights import FIRST_STRENGTH, ActiveInsight, Insights, key_of
from memory.records.trajectories import Trajectories
from memory.schema import Insight, Trajectory, Trust
from memory.scopes import is_shown
from memory.search.index import MemoryIndex, fuse
from memory.search.relevance import MIN_SIMILARITY, WORDS_ALONE_FLOOR, Match, select_relevant
from memory.storage.database import Database
from memory.storage.histogram import Histogram
from memory.trust import UntrustedText

SIMILAR_PER_SHOWN = 4  # similar solved tasks considered for each one shown: the shortest is chosen
MAX_SIMILAR = 256  # most that are considered when none of the first ones may be shown
# A solved task is longer than an insight and distracts more. With the embedded encoder, requests for the same thing in
# other words have a similarity of 0.63 and above, two games of one family 0.62 and above. The nearest of 1,000 unlike
# requests is above 0.55 for at most 2 % of queries, and above 0.45 for up to 11 %.
MIN_EXEMPLAR_SIMILARITY = 0.55
CHARS_PER_TOKEN = 4

logger = logging.getLogger(__name__)

T = TypeVar("T")
RoleAndContent = tuple[object, object]


@dataclass(frozen=True)
class MemorySegment:
    """The memory shown in one prompt. `Retrieval` makes it; the agent inserts the text and records its ids."""

    text: str = ""
    ids: list[str] = field(default_factory=list)
    """Ids of the insights, exemplars and passages in the text, in order."""
    num_tokens: int = 0


@dataclass(frozen=True)
class _Request:
    """One call of `retrieve`: the person, the task and the conversation so far."""

    text: str
    environment: str
    kind: str
    exclude_task: str | None
    tenant: str
    user_id: str
    episode_id: str | None
    conversation: list[RoleAndContent]

    @property
    def where(self) -> dict[str, str]:
        """The filter for tasks of the same kind: lessons carry over between them."""
        return {"environment": self.environment, "kind": self.kind}

    @property
    def person(self) -> dict[str, str]:
        """The tenant and the person of the request, as keyword arguments."""
        return {"tenant": self.tenant, "user_id": self.user_id}

    def continues(self, trajectory: Trajectory) -> bool:
        """Whether the request continues this trajectory: it is of the same episode, or its conversation begins with the
        trajectory's messages and has more."""
        opening = _without_instructions(trajectory.opening)
        is_continued = 0 < len(opening) < len(self.conversation) and self.conversation[: len(opening)] == opening
        return is_continued or trajectory.episode_id == self.episode_id


@dataclass
class _SegmentBuilder:
    """The memory segment while rows are added to it."""

    insights: list[str] = field(default_factory=list)
    exemplars: list[str] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)

    def render(self) -> str:
        """Return the segment's text, as models were trained on it; empty without rows."""
        sections = []
        if self.insights:
            sections.append("\n".join(["Insights:", *(f"- {text}" for text in self.insights)]))
        if self.exemplars:
            sections.append("\n".join(["Solved before:", *self.exemplars]))
        if self.passages:
            sections.append("\n".join(["Passages:", *self.passages]))
        return "\n".join(["<memory>", *sections, "</memory>"]) if sections else ""


def estimate(text: str) -> int:
    """Return the approximate number of tokens of a text."""
    return -(-len(text) // CHARS_PER_TOKEN)


class Retrieval:
    """Finds the memories that help with a request."""

    def __init__(
        self,
        database: Database,
        insights: Insights,
        trajectories: Trajectories,
        index: MemoryIndex,
        config: MemoryConfig,
    ) -> None:
        self._database = database
        self._exemplars = trajectories.exemplary().where(
            col(Trajectory.tenant) == bindparam("tenant"),
            is_shown(trajectories.scopes.of_exemplar()),
            col(Trajectory.id).in_(bindparam("ids", expanding=True)),
        )
        self._scopes = trajectories.scopes
        self._insights = insights
        self._index = index
        self._config = config
        self._seconds = {stage: Histogram() for stage in ("insights", "exemplars", "passages", "all")}

    @property
    def seconds(self) -> dict[str, Histogram]:
        """Durations by stage: those of the index, of each kind of memory, and of a whole call as `all`."""
        return {**self._index.seconds, **self._seconds}

    async def retrieve(
        self,
        *,
        environment: str | None,
        kind: str,
        task: str | None = None,
        query_text: str,
        exclude_task: str | None = None,
        budget_tokens: int | None = None,
        count_tokens: Callable[[str], int] = estimate,
        tenant: str = "",
        user_id: str = "",
        episode_id: str | None = None,
        conversation: Sequence[Mapping[str, object]] = (),
    ) -> MemorySegment:
        """Return the memory segment for a task: the best rows of each kind that fit `budget_tokens`.

        Rows are the whole tenant's and, with a `user_id`, that person's. `conversation` holds the messages so far, and
        `count_tokens` measures the rendered segment. A failing database yields an empty segment, never an error.
        """
        budget = self._config.memory_tokens if budget_tokens is None else budget_tokens
        if budget <= 0:
            return MemorySegment()
        request = _Request(
            text=query_text,
            environment=environment or "",
            kind=kind,
            exclude_task=exclude_task or task,
            tenant=tenant,
            user_id=user_id,
            episode_id=episode_id,
            conversation=_without_instructions(conversation),
        )
        try:
            with self._seconds["all"].measure():
                return await self._retrieve(request, budget, count_tokens)
        except StorageError as error:
            logger.warning("answering without memory: %s", error)
            return MemorySegment()

    async def _retrieve(self, request: _Request, budget: int, count_tokens: Callable[[str], int]) -> MemorySegment:
        segment, ids = _SegmentBuilder(), list[str]()
        # Concurrently: each waits for disk or Rust in a thread, and the query encoder encodes the text once for all.
        insights, exemplars, passages = await asyncio.gather(
            self._timed("insights", self._find_insights(request)),
            self._timed("exemplars", self._find_exemplars(request)),
            self._timed("passages", self._find_relevant_passages(request)),
        )
        sections = (
            (segment.insights, self._config.max_insights, insights),
            (segment.exemplars, self._config.max_exemplars, exemplars),
            (segment.passages, self._config.max_passages, passages),
        )
        for shown, limit, candidates in sections:
            for row_id, text in candidates:
                if len(shown) == limit:
                    break
                # before it is counted: the added spaces are tokens too
                shown.append(neutralise(text))
                if count_tokens(segment.render()) > budget:
                    shown.pop()  # a shorter candidate may still fit
                else:
                    ids.append(row_id)
        text = segment.render()
        return MemorySegment(text, ids, count_tokens(text)) if text else MemorySegment()

    async def _timed(self, stage: str, search: Awaitable[T]) -> T:
        with self._seconds[stage].measure():
            return await search

    async def _find_insights(self, request: _Request) -> list[tuple[str, str]]:
        """Return the supported insights, strongest first; among too many, strength and similarity are fused."""
        visible = self._insights.visible(**request.where, **request.person)
        by_text: dict[str, ActiveInsight] = {}
        for each in filter(is_supported, visible):  # a person's insight may repeat one of the whole tenant
            by_text.setdefault(key_of(each.text), each)
        insights = {each.id: each for each in by_text.values()}
        ranked = list(insights)
        if self._config.max_insights == 0:
            return []
        if len(ranked) > self._config.max_insights:
            similar = await self._index.find(
                "insights",
                request.text,
                request.where,
                self._config.max_insights,
                **request.person,
                min_similarity=MIN_SIMILARITY,
            )
            ranked = [row_id for row_id, _ in fuse(ranked, [row_id for row_id, _ in similar if row_id in insights])]
        return [(row_id, insights[row_id].text) for row_id in ranked]

    async def _find_exemplars(self, request: _Request) -> list[tuple[str, str]]:
        """Return similar solved tasks of the same kind, the shortest first; never the task or conversation at hand."""
        num, exemplars = SIMILAR_PER_SHOWN * self._config.max_exemplars, list[tuple[str, str]]()
        while 0 < num <= MAX_SIMILAR and not exemplars:
            matches, _ = await self._index.match(
                "exemplars",
                request.text,
                request.where,
                num,
                **request.person,
                exclude_task=request.exclude_task,
            )
            similar = [match.row_id for match in matches if _is_similar(match)]
            exemplars = await asyncio.to_thread(self._read_exemplars, request, similar[:num]) if similar else []
            if len(similar) < num:
                break
            num *= 4
        return exemplars

    def _read_exemplars(self, request: _Request, ids: list[str]) -> list[tuple[str, str]]:
        """Return (id, text as shown) of those of the trajectories that may be shown."""
        # Scope, trust and stage are checked again here: the index may be behind.
        with self._database.read() as session:
            rows = session.scalars(self._exemplars, {"ids": ids, **request.person})
            by_id = {trajectory.id: trajectory for trajectory in rows if not request.continues(trajectory)}
            trajectories = [by_id[row_id] for row_id in ids if row_id in by_id]
            # stable: of equally short ones the more similar comes first
            trajectories.sort(key=lambda trajectory: trajectory.num_steps)
            read = [(it, read_exemplar(session, it, self._scopes)) for it in trajectories]
            texts = {it.id: text for it, text in read if text is not None}
            return [(it.id, texts[it.id]) for it in _one_per_task([it for it, _ in read if it.id in texts])]

    async def find_passages(self, query_text: str, num: int, *, tenant: str = "") -> list[str]:
        """Return the passages nearest to a query as `title: text`, best first, for a caller that asked for them.

        Passages of untrusted documents are `UntrustedText`. Raises: StorageError.
        """
        matches, _ = await self._index.match("passages", query_text, tenant=tenant)
        wanted = [it.row_id for it in matches if (it.similarity or 0.0) >= MIN_SIMILARITY or it.word_match.coverage > 0]
        return [type(text)(neutralise(text)) for _, text in self._read_passages(tenant, wanted[:num])]

    async def _find_relevant_passages(self, request: _Request) -> list[tuple[str, str]]:
        """Return the passages to show to a request that asked for none: for most requests there are none."""
        if self._config.max_passages == 0:
            return []
        matches, num_rows = await self._index.match("passages", request.text, tenant=request.tenant)
        relevant = select_relevant(matches, num_rows)[: self._config.max_passages]
        return self._read_passages(request.tenant, [match.row_id for match in relevant])

    def _read_passages(self, tenant: str, ids: Sequence[str]) -> list[tuple[str, str]]:
        if not ids:
            return []
        with self._database.read() as session:
            passages = read_passages(session, ids, tenant)
        text_types = {Trust.TRUSTED: str, Trust.UNTRUSTED: UntrustedText}
        texts = {it.id: text_types[it.trust](f"{it.title}: {it.text}") for it in passages.values()}
        return [(row_id, texts[row_id]) for row_id in ids if row_id in texts]


def _is_similar(match: Match) -> bool:
    """Return whether a solved task is similar enough to be shown."""
    if match.similarity is None:
        return match.word_match.discounted_coverage >= WORDS_ALONE_FLOOR
    return match.similarity >= MIN_EXEMPLAR_SIMILARITY


def is_supported(insight: Insight | ActiveInsight) -> bool:
    """Return whether an insight may be shown: it is strong enough, or following it wins more often than not."""
    if insight.strength >= FIRST_STRENGTH:
        return True
    tried, otherwise = insight.wins + insight.losses, insight.wins_otherwise + insight.losses_otherwise
    if not tried:
        return False
    return insight.wins / tried > (insight.wins_otherwise / otherwise if otherwise else 0.5)


def _one_per_task(trajectories: list[Trajectory]) -> list[Trajectory]:
    by_task: dict[str, Trajectory] = {}
    for trajectory in trajectories:
        by_task.setdefault(trajectory.task or trajectory.id, trajectory)
    return list(by_task.values())


def _without_instructions(messages: Iterable[Mapping[str, object]]) -> list[RoleAndContent]:
    """Return the messages without those of the operator, as (role, content)."""
    pairs = [(message.get("role"), message.get("content")) for message in messages]
    return [(role, content) for role, content in pairs if role not in ("system", "developer")]
