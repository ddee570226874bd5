"""One question in; the memory segment out: insights, solved tasks and passages, within a token budget.

This module refuses to know how an episode is played and how the index finds. What is shown is data: markers of
memory and of the chat in it are broken, so that nothing remembered can speak as the system.

Invariants: nothing of another tenant or another person, even where an index is behind: rows are asked again whose they
are, and whether they still count; never an exemplar of the task or the conversation that is asked about; never over the
budget; the layout of the segment is what models were trained on, to the character.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
from memory.storage.histogram import Tally
from memory.trust import UntrustedText

SIMILAR_PER_SHOWN = 4  # how many similar solved tasks are looked at for each that is shown: the shortest wins
MAX_SIMILAR = 256  # where all of those may not be shown, more are looked at, up to so many
# A solved task is longer than an insight and distracts more. With the embedded encoder, requests for the same thing in
# other words are at 0.63 and above, two games of one family at 0.62 and above. The nearest of 1,000 unlike requests is
# above 0.55 for at most 2 % of questions, and above 0.45 for up to 11 %.
MIN_EXEMPLAR_SIMILARITY = 0.55
CHARS_PER_TOKEN = 4

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class MemorySegment:
    """What is shown of memory: its text, the ids of the rows it shows, in order, and its size."""

    text: str = ""
    ids: list[str] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True)
class _Question:
    """Who asks, and about what."""

    text: str
    environment: str
    kind: str
    exclude_task: str | None
    tenant: str
    user_id: str
    episode_id: str | None
    conversation: list[tuple[Any, Any]]

    @property
    def where(self) -> dict[str, str]:
        """The kind of task that lessons carry over from."""
        return {"environment": self.environment, "kind": self.kind}

    @property
    def asker(self) -> dict[str, str]:
        return {"tenant": self.tenant, "user_id": self.user_id}

    def is_of(self, trajectory: Trajectory) -> bool:
        """Whether the question comes out of what this trajectory recorded: it is of the same episode, or its messages
        begin with the trajectory's own and go on."""
        opening = _said(trajectory.opening)
        goes_on = 0 < len(opening) < len(self.conversation) and self.conversation[: len(opening)] == opening
        return goes_on or trajectory.episode_id == self.episode_id


@dataclass
class _Segment:
    """The memory segment while it grows."""

    insights: list[str] = field(default_factory=list)
    exemplars: list[str] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)

    def render(self) -> str:
        sections = []
        if self.insights:
            sections.append("\n".join(["Insights:", *(f"- {text}" for text in self.insights)]))
        if self.exemplars:
            sections.append("\n".join(["Solved before:", *self.exemplars]))
        if self.passages:
            sections.append("\n".join(["Passages:", *self.passages]))
        return "\n".join(["<memory>", *sections, "</memory>"]) if sections else ""


def estimate(text: str) -> int:
    """Return about how many tokens a text has."""
    return -(-len(text) // CHARS_PER_TOKEN)


class Retrieval:
    """Answers "what do we know that helps here?"."""

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
            Trajectory.tenant == bindparam("tenant"),
            is_shown(trajectories.scopes.of_exemplar()),
            col(Trajectory.id).in_(bindparam("ids", expanding=True)),
        )
        self._scopes = trajectories.scopes
        self._insights = insights
        self._index = index
        self._config = config
        self._seconds = {stage: Tally() for stage in ("insights", "exemplars", "passages", "all")}

    @property
    def seconds(self) -> dict[str, Tally]:
        """How long each stage took so far: the index's, what is made of them, and `all` of it for one question."""
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
        conversation: Sequence[Mapping[str, Any]] = (),
    ) -> MemorySegment:
        """Return what memory has to show for a task, best first, as much as fits the budget: of what all of the tenant
        are shown and, where a person is named, of what that person is. `conversation` are the messages so far.

        Storage that fails costs the memory, never the answer.
        """
        budget = self._config.memory_tokens if budget_tokens is None else budget_tokens
        if budget <= 0:
            return MemorySegment()
        place = (environment or "", kind, exclude_task or task)
        question = _Question(query_text, *place, tenant, user_id, episode_id, _said(conversation))
        try:
            with self._seconds["all"].measure():
                return await self._retrieve(question, budget, count_tokens)
        except StorageError as error:
            logger.warning("answering without memory: %s", error)
            return MemorySegment()

    async def _retrieve(self, question: _Question, budget: int, count_tokens: Callable[[str], int]) -> MemorySegment:
        segment, ids = _Segment(), []
        # At once: their threads wait for one another's disk and Rust, and the question is encoded once for all.
        insights, exemplars, passages = await asyncio.gather(
            self._timed("insights", self._find_insights(question)),
            self._timed("exemplars", self._find_exemplars(question)),
            self._timed("passages", self._find_relevant_passages(question)),
        )
        sections = (
            (segment.insights, self._config.max_insights, insights),
            (segment.exemplars, self._config.max_exemplars, exemplars),
            (segment.passages, self._config.max_passages, passages),
        )
        for shown, most, found in sections:
            for row_id, text in found:
                if len(shown) == most:
                    break
                shown.append(neutralise(text))
                if count_tokens(segment.render()) > budget:
                    shown.pop()  # a shorter one may still fit
                else:
                    ids.append(row_id)
        text = segment.render()
        return MemorySegment(text, ids, count_tokens(text)) if text else MemorySegment()

    async def _timed(self, stage: str, finding: Awaitable[T]) -> T:
        with self._seconds[stage].measure():
            return await finding

    async def _find_insights(self, question: _Question) -> list[tuple[str, str]]:
        """Return the insights that evidence supports; where there are too many, strength and meaning choose."""
        standing = self._insights.standing(**question.where, **question.asker)
        by_words: dict[str, ActiveInsight] = {}
        for each in filter(is_supported, standing):  # a person's own may say what all are shown already
            by_words.setdefault(key_of(each.text), each)
        insights = {each.id: each for each in by_words.values()}
        ranked = list(insights)
        if self._config.max_insights == 0:
            return []
        if len(ranked) > self._config.max_insights:
            near = await self._index.find(
                "insights",
                question.text,
                question.where,
                self._config.max_insights,
                **question.asker,
                min_similarity=MIN_SIMILARITY,
            )
            ranked = [row_id for row_id, _ in fuse(ranked, [row_id for row_id, _ in near if row_id in insights])]
        return [(row_id, insights[row_id].text) for row_id in ranked]

    async def _find_exemplars(self, question: _Question) -> list[tuple[str, str]]:
        """Return solved tasks of the same kind, never the task or the conversation itself: of the similar ones the
        shortest first."""
        num, exemplars = SIMILAR_PER_SHOWN * self._config.max_exemplars, []
        while 0 < num <= MAX_SIMILAR and not exemplars:
            found, _ = await self._index.match(
                "exemplars",
                question.text,
                question.where,
                num,
                **question.asker,
                exclude_task=question.exclude_task,
            )
            near = [match.row_id for match in found if _is_alike(match)]
            exemplars = self._read_exemplars(question, near[:num]) if near else []
            if len(near) < num:
                break
            num *= 4
        return exemplars

    def _read_exemplars(self, question: _Question, ids: list[str]) -> list[tuple[str, str]]:
        """Return those of the trajectories that may be shown, as they read."""
        with self._database.read() as session:
            rows = session.scalars(self._exemplars, {"ids": ids, **question.asker})
            found = {trajectory.id: trajectory for trajectory in rows if not question.is_of(trajectory)}
            trajectories = [found[row_id] for row_id in ids if row_id in found]
            trajectories.sort(key=lambda trajectory: trajectory.num_steps)
            read = [(it, read_exemplar(session, it, self._scopes)) for it in trajectories]
            texts = {it.id: text for it, text in read if text is not None}
            return [(it.id, texts[it.id]) for it in _one_per_task([it for it, _ in read if it.id in texts])]

    async def find_passages(self, query_text: str, num: int, *, tenant: str = "") -> list[str]:
        """Return the passages nearest to a question, each after its document's title, best first; as `UntrustedText`
        those of untrusted documents.

        Raises: StorageError.
        """
        matches, _ = await self._index.match("passages", query_text, tenant=tenant)
        wanted = [it.row_id for it in matches if (it.similarity or 0.0) >= MIN_SIMILARITY or it.words.coverage > 0]
        return [type(text)(neutralise(text)) for _, text in self._read_passages(tenant, wanted[:num])]

    async def _find_relevant_passages(self, question: _Question) -> list[tuple[str, str]]:
        """Return the passages that go into the prompt of somebody who asked for none: nothing for most requests."""
        if self._config.max_passages == 0:
            return []
        matches, num_rows = await self._index.match("passages", question.text, tenant=question.tenant)
        relevant = select_relevant(matches, num_rows)[: self._config.max_passages]
        return self._read_passages(question.tenant, [match.row_id for match in relevant])

    def _read_passages(self, tenant: str, ids: Sequence[str]) -> list[tuple[str, str]]:
        if not ids:
            return []
        with self._database.read() as session:
            found = read_passages(session, ids, tenant)
        kinds = {Trust.TRUSTED: str, Trust.UNTRUSTED: UntrustedText}
        texts = {it.id: kinds[it.trust](f"{it.title}: {it.text}") for it in found.values()}
        return [(row_id, texts[row_id]) for row_id in ids if row_id in texts]


def _is_alike(match: Match) -> bool:
    """Whether a solved task is like the one that is asked about."""
    if match.similarity is None:
        return match.words.evidence >= WORDS_ALONE_FLOOR
    return match.similarity >= MIN_EXEMPLAR_SIMILARITY


def is_supported(insight: Insight | ActiveInsight) -> bool:
    """Whether an insight may be shown: not voted down, or doing what it says wins more often than not doing it."""
    if insight.strength >= FIRST_STRENGTH:
        return True
    tried, otherwise = insight.wins + insight.losses, insight.wins_otherwise + insight.losses_otherwise
    if not tried:
        return False
    return insight.wins / tried > (insight.wins_otherwise / otherwise if otherwise else 0.5)


def _one_per_task(trajectories: list[Trajectory]) -> list[Trajectory]:
    kept = {}
    for trajectory in trajectories:
        kept.setdefault(trajectory.task or trajectory.id, trajectory)
    return list(kept.values())


def _said(messages: Iterable[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    """Return who said what, without the instructions."""
    told = [(message.get("role"), message.get("content")) for message in messages]
    return [(role, content) for role, content in told if role not in ("system", "developer")]
