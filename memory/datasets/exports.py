"""Everything that can be exported, page by page: recorded episodes, what can be learned from them, imported examples.

Flow: a page of trajectories or examples -> contents -> rows of a format. A page costs the same wherever it lies, so an
export of any length needs the memory of one page, and goes on behind any cursor.
Invariants: only the tenant's own rows; nothing held out is a demonstration, a preference or a label; untrusted text is
none of these either, until an operator approved it. Memory segments are left out: prompts are as clients wrote them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

from sqlalchemy import ColumnElement, Row, false, func
from sqlalchemy import select as sql_select
from sqlmodel import Session, col, select

from memory.conversation import RecordedStep, restore_messages, show_plan
from memory.datasets.examples import Examples, content_of, user_texts_of
from memory.formats.content import ExampleContent, ExampleKind, Message
from memory.formats.messages import read_text
from memory.held_out import HeldOut, is_episode_held_out, is_held_out_by_clients
from memory.records.feedback import position_of_reply
from memory.records.trajectories import Trajectories
from memory.records.trajectory_queries import effective_reward_of
from memory.schema import Example, Feedback, Split, Step, Trajectory, TrajectoryStage, Trust, may_teach
from memory.storage.database import Database
from memory.team import Role, find_plan, is_actors

PAGE_TRAJECTORIES = 32
PAGE_EXAMPLES = 100
OWN_FORMAT = "ratchet"


class ExportContent(StrEnum):
    """The contents of an export."""

    TRAJECTORIES = "trajectories"  # all closed episodes, with their rewards
    DEMONSTRATIONS = "demonstrations"  # successes and corrections; imported demonstrations
    PREFERENCES = "preferences"  # corrections and pairs of a win and a loss of one task; imported preferences
    LABELS = "labels"  # rewarded episodes as good or bad; imported labels


KINDS = {
    ExportContent.TRAJECTORIES: ExampleKind.DEMONSTRATION,
    ExportContent.DEMONSTRATIONS: ExampleKind.DEMONSTRATION,
    ExportContent.PREFERENCES: ExampleKind.PREFERENCE,
    ExportContent.LABELS: ExampleKind.LABEL,
}
"""The kind of an export's rows."""


@dataclass(frozen=True)
class ExportQuery:
    """Which rows are exported."""

    content: ExportContent
    tenant: str = ""
    environment: str | None = None
    """None for all; empty for live traffic."""
    with_episodes: bool = True
    with_examples: bool = True


@dataclass(frozen=True)
class ExportedRow:
    """All that one trajectory or one example gives."""

    cursor: str
    """The id of the trajectory or example: an export goes on behind it."""
    contents: list[ExampleContent]
    format: str
    """The format that an example was imported from; that of an episode can hold all that is known of it."""


@dataclass(frozen=True)
class _Episode:
    """A closed trajectory as it is exported."""

    trajectory: Row[Any]
    steps: Sequence[Row[Any]]
    corrections: Sequence[tuple[int, str]] = field(default=())
    """(position of the reply, the better text), the newest of each reply."""

    @property
    def reward(self) -> float | None:
        return self.trajectory.reward

    @property
    def opening(self) -> list[Message]:
        opening = show_plan(self.trajectory.opening, find_plan(self.steps))
        return [{**each, "content": read_text(each.get("content"), "content")} for each in opening]

    @property
    def replies(self) -> list[Message]:
        return restore_messages(self.recorded_steps)

    def replies_before(self, position: int) -> int:
        """Return how many of `replies` come before the step at a position."""
        return sum(is_actors(step) for step in self.recorded_steps[:position])

    @property
    def recorded_steps(self) -> Sequence[RecordedStep]:
        # a row has its columns as attributes, which its type does not say
        return cast(Sequence[RecordedStep], self.steps)

    @property
    def may_teach(self) -> bool:
        """Whether it may teach, and is not held out by its split."""
        return self.trajectory.split is not Split.HELD_OUT and may_teach(self.trajectory)

    def describe(self, kind: ExampleKind, completion: list[Message], **fields: Any) -> ExampleContent:
        return ExampleContent(
            kind, completion, tools=self.trajectory.tools or [], task=self.trajectory.task or None, **fields
        )


class Exports:
    """Reads what is exported."""

    def __init__(self, database: Database, trajectories: Trajectories, examples: Examples) -> None:
        self._database = database
        self._trajectories = trajectories
        self._examples = examples
        self._success_reward = trajectories.success_reward

    def read(self, query: ExportQuery, *, after: str = "") -> Iterator[list[ExportedRow]]:
        """Yield pages of rows behind the cursor `after`: episodes first, then examples; oldest first. Blocks.

        Raises: ValueError for a cursor of another form.
        """
        kind, _, _ = after.partition("_")
        if after and kind not in ("trj", "exm"):
            raise ValueError(f"there is no cursor {after!r}: pass one that an export returned, or none to begin")
        held_out = self._trajectories.held_out_tasks()
        if query.with_episodes and kind != "exm":
            yield from self._read_episodes(query, after, held_out)
        # an imported demonstration is no trajectory: it was not played here
        if query.with_examples and query.content is not ExportContent.TRAJECTORIES:
            yield from self._read_examples(query, after if kind == "exm" else "", held_out)

    def count(self, query: ExportQuery, *, after: str = "") -> int:
        """Return how many trajectories and examples `read` will go through, for a progress bar."""
        kind, _, _ = after.partition("_")
        num = 0
        with self._database.read() as session:
            if query.with_episodes and kind != "exm":
                conditions = self._episode_conditions(query, after)
                num += session.scalar(sql_select(func.count()).select_from(Trajectory).where(*conditions)) or 0
            if query.with_examples and query.content is not ExportContent.TRAJECTORIES:
                conditions = [
                    col(Example.tenant) == query.tenant,
                    col(Example.kind) == KINDS[query.content],
                    col(Example.id) > (after if kind == "exm" else ""),
                ]
                if query.environment is not None:
                    conditions.append(col(Example.environment) == query.environment)
                num += session.scalar(sql_select(func.count()).select_from(Example).where(*conditions)) or 0
        return num

    def _read_examples(self, query: ExportQuery, after: str, held_out: HeldOut) -> Iterator[list[ExportedRow]]:
        while page := self._examples.read_page(
            after_id=after,
            limit=PAGE_EXAMPLES,
            kind=KINDS[query.content],
            environment=query.environment,
            tenant=query.tenant,
        ):
            after = page[-1].id
            yield [
                ExportedRow(
                    example.id, [content_of(example)] if self._is_exported(example, held_out) else [], example.format
                )
                for example in page
            ]

    def _is_exported(self, example: Example, held_out: HeldOut) -> bool:
        """Whether an example is what its kind says: untrusted ones and failed demonstrations are not, nor those of
        tasks that clients hold out."""
        texts = user_texts_of(example)
        if is_held_out_by_clients(held_out, example.tenant, example.environment, example.task, texts):
            return False
        is_success = example.reward is None or example.reward >= self._success_reward
        return example.trust is Trust.TRUSTED and (is_success or example.kind is not ExampleKind.DEMONSTRATION)

    def _read_episodes(self, query: ExportQuery, after: str, held_out: HeldOut) -> Iterator[list[ExportedRow]]:
        while True:
            with self._database.read() as session:
                episodes = self._read_page(session, query, after)
                rows = [
                    ExportedRow(each.trajectory.id, list(self._contents_of(session, query, each, held_out)), OWN_FORMAT)
                    for each in episodes
                ]
            if not episodes:
                return
            after = rows[-1].cursor
            yield rows

    def _episode_conditions(self, query: ExportQuery, after: str) -> list[ColumnElement[bool]]:
        conditions = [
            col(Trajectory.tenant) == query.tenant,
            col(Trajectory.id) > after,
            col(Trajectory.stage) != TrajectoryStage.RUNNING,
        ]
        if query.environment is not None:
            conditions.append(func.coalesce(Trajectory.environment, "") == query.environment)
        if query.content is not ExportContent.TRAJECTORIES:
            # the beginning of a branch is exported with its origin
            conditions.append(col(Trajectory.branch_of).is_(None))
        return conditions

    def _read_page(self, session: Session, query: ExportQuery, after: str) -> list[_Episode]:
        columns = _columns(effective_reward_of(col(Trajectory.id)).label("reward"))
        statement = sql_select(*columns).where(*self._episode_conditions(query, after))
        rows = session.execute(statement.order_by(col(Trajectory.id)).limit(PAGE_TRAJECTORIES)).all()
        if query.content is ExportContent.TRAJECTORIES:
            return _with_steps(session, rows)
        return _with_corrections(session, _with_steps(session, rows))

    def _contents_of(
        self, session: Session, query: ExportQuery, episode: _Episode, held_out: HeldOut
    ) -> Iterator[ExampleContent]:
        replies = episode.replies
        if not any(reply["role"] == "assistant" for reply in replies):
            return  # it failed before the model said anything
        if query.content is ExportContent.TRAJECTORIES:
            yield episode.describe(
                ExampleKind.DEMONSTRATION,
                replies,
                prompt=episode.opening,
                reward=episode.reward,
                extra=_describe(episode.trajectory) | _describe_team(episode.steps),
            )
        elif episode.may_teach and not is_episode_held_out(held_out, episode.trajectory):
            match query.content:
                case ExportContent.DEMONSTRATIONS:
                    yield from self._demonstrations(episode, replies)
                case ExportContent.PREFERENCES:
                    yield from self._preferences(session, episode, replies, held_out)
                case ExportContent.LABELS:
                    yield from self._labels(episode, replies)

    def _is_success(self, reward: float | None) -> bool:
        return reward is not None and reward >= self._success_reward

    def _demonstrations(self, episode: _Episode, replies: list[Message]) -> Iterator[ExampleContent]:
        for position, text in episode.corrections:
            prompt = [*episode.opening, *replies[: episode.replies_before(position)]]
            yield episode.describe(
                ExampleKind.DEMONSTRATION, [{"role": "assistant", "content": text}], prompt=prompt, reward=None
            )
        row = episode.trajectory
        # a corrected success is none: a person has said so
        is_imitable = row.stage is TrajectoryStage.FINISHED and not row.num_invalid_tool_calls
        if is_imitable and self._is_success(episode.reward) and not episode.corrections:
            yield episode.describe(ExampleKind.DEMONSTRATION, replies, prompt=episode.opening, reward=episode.reward)

    def _labels(self, episode: _Episode, replies: list[Message]) -> Iterator[ExampleContent]:
        if episode.reward is not None and episode.trajectory.stage is TrajectoryStage.FINISHED:
            is_good = self._is_success(episode.reward) and not episode.corrections
            yield episode.describe(ExampleKind.LABEL, replies, prompt=episode.opening, is_good=is_good)

    def _preferences(
        self, session: Session, episode: _Episode, replies: list[Message], held_out: HeldOut
    ) -> Iterator[ExampleContent]:
        for position, text in episode.corrections:
            yield episode.describe(
                ExampleKind.PREFERENCE,
                [{"role": "assistant", "content": text}],
                prompt=[*episode.opening, *replies[: episode.replies_before(position)]],
                rejected=[replies[episode.replies_before(position)]],
            )
        is_won = episode.trajectory.stage is TrajectoryStage.FINISHED and self._is_success(episode.reward)
        if is_won and not episode.corrections and episode.trajectory.task:
            loss = self._find_loss(session, episode.trajectory)
            if loss is not None and not is_episode_held_out(held_out, loss.trajectory):
                yield from _pair(episode, loss)

    def _find_loss(self, session: Session, won: Row[Any]) -> _Episode | None:
        """Return the newest failure of the same task, if it has any."""
        reward = effective_reward_of(col(Trajectory.id)).label("reward")
        statement = (
            sql_select(*_columns(reward))
            .where(
                col(Trajectory.environment).is_(None)
                if won.environment is None
                else col(Trajectory.environment) == won.environment,
                col(Trajectory.task) == won.task,
                col(Trajectory.tenant) == won.tenant,
                col(Trajectory.stage) == TrajectoryStage.FINISHED,
                col(Trajectory.branch_of).is_(None),
                reward < self._success_reward,
            )
            .order_by(col(Trajectory.id).desc())
            .limit(1)
        )
        found = _with_steps(session, session.execute(statement).all())
        return found[0] if found and found[0].may_teach else None


def _columns(reward: ColumnElement[Any]) -> list[Any]:
    names = ("id", "tenant", "environment", "task", "task_text", "split", "policy", "stage", "trust", "approved_at")
    names += ("exemplar_text", "opening", "tools", "num_invalid_tool_calls", "opened_at", "branch_of")
    return [*(getattr(Trajectory, name) for name in names), reward]


def _with_steps(session: Session, rows: Sequence[Row[Any]]) -> list[_Episode]:
    # without token ids, which are most of a step; as plain rows, which cost a third of objects
    statement = (
        sql_select(
            *(
                getattr(Step, name)
                for name in ("trajectory_id", "kind", "content", "tool_calls", "tool_call_id", "role", "position")
            )
        )
        .where(col(Step.trajectory_id).in_([row.id for row in rows]))
        .order_by(col(Step.trajectory_id), col(Step.position))
    )
    steps: dict[str, list[Row[Any]]] = defaultdict(list)
    for step in session.execute(statement if rows else statement.where(false())):
        steps[step.trajectory_id].append(step)
    return [_Episode(row, steps[row.id]) for row in rows]


def _with_corrections(session: Session, episodes: Sequence[_Episode]) -> list[_Episode]:
    ids = [each.trajectory.id for each in episodes]
    query = select(Feedback).where(col(Feedback.trajectory_id).in_(ids), col(Feedback.correction).is_not(None))
    corrected: dict[str, dict[int, str]] = defaultdict(dict)
    for feedback in session.exec(query.order_by(col(Feedback.sequence))):
        position = position_of_reply(session, feedback)
        if position is not None and feedback.correction:
            corrected[feedback.trajectory_id][position] = feedback.correction
    return [_Episode(each.trajectory, each.steps, sorted(corrected[each.trajectory.id].items())) for each in episodes]


def _pair(won: _Episode, lost: _Episode) -> Iterator[ExampleContent]:
    """Yield the two continuations of where a win and a loss of one task part (ETO, arXiv 2403.02502), if a reply parts
    them."""
    better, worse = [*won.opening, *won.replies], [*lost.opening, *lost.replies]
    length = next(
        (
            position
            for position, (one, other) in enumerate(zip(better, worse, strict=False))
            if _without_ids(one) != _without_ids(other)
        ),
        None,
    )
    if length is None or not better[length]["role"] == worse[length]["role"] == "assistant":
        return
    yield won.describe(ExampleKind.PREFERENCE, better[length:], prompt=better[:length], rejected=worse[length:])


def _without_ids(message: Message) -> Message:
    """Return a message without the ids of its calls, which differ in every episode."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls, "tool_call_id": None}


def _describe(trajectory: Row[Any]) -> dict[str, Any]:
    return {
        "id": trajectory.id,
        "environment": trajectory.environment,
        "split": trajectory.split.value,
        "policy": f"v{trajectory.policy}",
        "stage": trajectory.stage.value,
        "opened_at": trajectory.opened_at.isoformat(),
        **({} if trajectory.branch_of is None else {"branch_of": trajectory.branch_of}),
    }


def _describe_team(steps: Sequence[Row[Any]]) -> dict[str, Any]:
    """Return the role of each call of a team, and the texts that are no messages of the actor's conversation."""
    team = [
        {"position": step.position, "role": step.role.value}
        | ({} if step.role is Role.ACTOR else {"content": step.content})
        for step in steps
        if step.role is not None
    ]
    return {"team": team} if team else {}
