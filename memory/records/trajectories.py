"""Episodic memory: trajectories from the first message to the last reward, each step durable before the next.

A `tenant` of None, where one can be given, means "whoever's": for the server's own work, never for a caller's question.

This module refuses to know who acts, how a reward is decided, or how exemplars are found; it only tells the outbox
which trajectory is worth another look. The flow: open, append ..., close; rewards may come before or after the
close.

Invariants: a closed trajectory takes no more steps; positions have no gaps; held-out trajectories never become
exemplars or lessons; rewards are only ever added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, Select, and_, bindparam, case, exists, func, insert, literal, or_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased, defer
from sqlmodel import Session, col, select

from memory.errors import IllegalMove, UnknownPolicy, UnknownTrajectory
from memory.records.tool_results import find_result
from memory.schema import (
    LEGAL_MOVES,
    Feedback,
    Outbox,
    Policy,
    Reward,
    RewardSource,
    Split,
    Step,
    StepKind,
    Trajectory,
    TrajectoryStage,
    Trust,
    new_id,
    now,
)
from memory.scopes import Scopes, is_shown
from memory.storage.database import Database
from memory.teaching import OPERATOR, Teacher, reward_teaches, teaching_keys
from memory.trust import Exchange, digest_exchange, is_trusted, trust_of

TRUST = (RewardSource.USER, RewardSource.CODE, RewardSource.ENVIRONMENT, RewardSource.JUDGE)  # most trusted first
BYTES_PER_TOKEN_ID = 4


@dataclass(frozen=True)
class TrajectoryView:
    """A trajectory with the reward that counts; both None where nobody has judged it yet."""

    trajectory: Trajectory
    reward: float | None
    is_success: bool | None


@dataclass(frozen=True)
class Graded:
    """A finished, rewarded trajectory from which one may learn."""

    trajectory: Trajectory
    reward: float
    is_success: bool
    teacher: Teacher = OPERATOR
    """Who gave the reward."""


@dataclass(frozen=True)
class Measures:
    """How long a trajectory is: its steps, those of them that are model calls, and their tokens."""

    num_steps: int
    num_model_calls: int
    prompt_tokens: int
    output_tokens: int


class Trajectories:
    """All episodes ever lived here, and what they were worth."""

    def __init__(self, database: Database, *, success_reward: float = 1.0, scopes: Scopes | None = None) -> None:
        self._database = database
        self.scopes = scopes or Scopes()
        self.success_reward = success_reward
        self.num_closed: Counter[tuple[str, Split]] = Counter()
        """Since the start, by how they ended and by split."""

    async def open(self, trajectory: Trajectory) -> Trajectory:
        """Record that an episode began; durable when it returns.

        Raises: UnknownPolicy; ValueError for an id that is taken or a stage other than RUNNING.
        """
        if trajectory.stage is not TrajectoryStage.RUNNING:
            raise ValueError(f"a trajectory opens as 'running', not as {trajectory.stage.value!r}")
        try:
            await self._database.take(_INSERT_TRAJECTORY, vars(trajectory))
        except IntegrityError as error:
            raise self._refused_trajectory(trajectory) from error
        return trajectory

    async def append(self, step: Step, *, trajectory: Trajectory) -> None:
        """Add the next step; durable when it returns.

        Raises: UnknownTrajectory, IllegalMove when the trajectory is closed, ValueError for a position out of order.
        """
        if step.trajectory_id != trajectory.id:
            raise ValueError(f"step of {step.trajectory_id!r} cannot be appended to trajectory {trajectory.id!r}")
        # model_dump would copy thousands of token ids, one by one
        if not await self._database.take(_INSERT_STEP, vars(step)):
            raise self._refused_step(step)

    async def close(
        self,
        trajectory_id: str,
        *,
        stage: TrajectoryStage,
        answer: str | None = None,
        error: str | None = None,
        num_invalid_tool_calls: int = 0,
        reply: str | None = None,
    ) -> Trajectory:
        """End the episode: sum its tokens and steps, fix its answer; a success becomes an exemplar.

        `reply` is what the client reads as the answer, where that differs: a streamed one holds all texts of a turn.
        Raises: UnknownTrajectory; IllegalMove when it is closed already.
        """

        def write(session: Session) -> Trajectory:
            trajectory = _require(session, trajectory_id)
            _close(session, trajectory, TrajectoryStage(stage), error)
            trajectory.answer = answer
            trajectory.num_invalid_tool_calls = num_invalid_tool_calls
            said = reply or answer
            if trajectory.trust is Trust.UNTRUSTED and said:
                trajectory.reply_digest = digest_exchange(trajectory.tenant, trajectory.task_text, said)
            session.add(trajectory)
            self.note_exemplar(session, trajectory)
            return trajectory

        closed = await self._database.write(write)
        self.num_closed[_outcome_of(closed), closed.split] += 1
        return closed

    async def reward(self, trajectory_id: str, value: float, source: RewardSource, reason: str = "") -> Reward:
        """Add a reward, before or after the close. Raises: UnknownTrajectory; ValueError outside [0, 1]."""
        source = RewardSource(source)
        check_reward(value)
        return await self._database.write(
            lambda session: self.add_reward(session, trajectory_id, value, source, reason)
        )

    def add_reward(
        self,
        session: Session,
        trajectory_id: str,
        value: float,
        source: RewardSource,
        reason: str,
        *,
        key_id: str | None = None,
        user_id: str = "",
    ) -> Reward:
        """Add a reward inside a transaction of the caller's, with the key and the person it comes from."""
        trajectory = _require(session, trajectory_id)
        reward = Reward(
            id=new_id("rew"),
            trajectory_id=trajectory_id,
            value=value,
            source=source,
            reason=reason,
            key_id=key_id,
            user_id=user_id,
        )
        session.add(reward)
        session.flush()
        self.note_exemplar(session, trajectory)
        return reward

    def note_exemplar(self, session: Session, trajectory: Trajectory) -> None:
        """Have the index look at a closed trajectory again if its success may have changed."""
        if trajectory.stage is not TrajectoryStage.FINISHED or trajectory.split is Split.HELD_OUT:
            return
        reward = session.scalar(_EFFECTIVE_REWARD, {"trajectory_id": trajectory.id})
        is_corrected = session.scalar(_IS_THIS_CORRECTED, {"trajectory_id": trajectory.id})
        if reward is not None or is_corrected:
            is_success = is_corrected or reward >= self.success_reward
            session.add(Outbox(collection="exemplars", row_id=trajectory.id, is_removed=not is_success))

    async def distrust(self, trajectory_id: str) -> None:
        """Mark an episode that untrusted text is about to enter. Raises: UnknownTrajectory."""

        def write(session: Session) -> None:
            trajectory = _require(session, trajectory_id)
            trajectory.trust = Trust.UNTRUSTED
            session.add(trajectory)

        await self._database.write(write)

    async def approve(self, trajectory_id: str, *, tenant: str | None = None) -> Trajectory:
        """Let memory show and weights learn an episode although untrusted text is in it: an operator has read it.

        Raises: UnknownTrajectory; IllegalMove while it is still running, because more text may enter it.
        """

        def write(session: Session) -> Trajectory:
            trajectory = _require(session, trajectory_id, tenant)
            if trajectory.stage is TrajectoryStage.RUNNING:
                raise IllegalMove(f"trajectory {trajectory_id!r} is still running: approve it when it is closed")
            trajectory.approved_at = trajectory.approved_at or now()
            session.add(trajectory)
            self.note_exemplar(session, trajectory)
            return trajectory

        return await self._database.write(write)

    def trust_of(
        self, *, memory_ids: Sequence[str] = (), exchanges: Sequence[Exchange] = (), tenant: str = ""
    ) -> Trust:
        """Return the least trust among the memories that an episode is shown and what was said before it."""
        if not memory_ids and not exchanges:
            return Trust.TRUSTED
        with self._database.read() as session:
            return trust_of(session, memory_ids=memory_ids, exchanges=exchanges, tenant=tenant)

    async def note_invalid_calls(self, trajectory_id: str, num_invalid_tool_calls: int) -> None:
        """Keep the count of a running trajectory for whoever takes it up again. Raises: UnknownTrajectory."""

        def write(session: Session) -> None:
            trajectory = _require(session, trajectory_id)
            trajectory.num_invalid_tool_calls = num_invalid_tool_calls
            session.add(trajectory)

        await self._database.write(write)

    def waiting(
        self,
        *,
        handover_digest: str | None = None,
        episode_id: str | None = None,
        handed_over_before: datetime | None = None,
        tenant: str | None = None,
    ) -> list[Trajectory]:
        """Return the running trajectories whose last reply handed tool calls over to a client, oldest first."""
        handover = _last_handover(handover_digest, handed_over_before)
        is_meant = [Trajectory.stage == TrajectoryStage.RUNNING]
        if episode_id is not None:
            is_meant.append(Trajectory.episode_id == episode_id)
        if tenant is not None:
            is_meant.append(Trajectory.tenant == tenant)
        with self._database.read() as session:
            if handover_digest is not None:
                # In two steps, so that SQLite begins with the few of this digest, not with all that run.
                ids = session.scalars(handover.where(exists().where(Trajectory.id == Step.trajectory_id, *is_meant)))
                found = [session.get_one(Trajectory, trajectory_id) for trajectory_id in ids]
            else:
                is_waiting = handover.where(Step.trajectory_id == Trajectory.id).exists()
                found = session.exec(select(Trajectory).where(*is_meant, is_waiting))
            return sorted(found, key=lambda trajectory: trajectory.id)

    async def close_orphans(self) -> int:
        """Close as FAILED what a dead process left RUNNING; return how many. For the start, before anything opens.

        What waits for a client goes on waiting: all of it is in its rows.
        """

        def write(session: Session) -> list[Trajectory]:
            is_waiting = _last_handover().where(Step.trajectory_id == Trajectory.id).exists()
            query = select(Trajectory).where(Trajectory.stage == TrajectoryStage.RUNNING, ~is_waiting)
            orphans = session.exec(query).all()
            for trajectory in orphans:
                _close(
                    session, trajectory, TrajectoryStage.FAILED, "Interrupted: the process ended before the episode did"
                )
                session.add(trajectory)
            return list(orphans)

        orphans = await self._database.write(write)
        self.num_closed.update((_outcome_of(orphan), orphan.split) for orphan in orphans)
        return len(orphans)

    def get(self, trajectory_id: str, *, tenant: str | None = None) -> Trajectory:
        """Return one trajectory. Raises: UnknownTrajectory, also for another tenant's."""
        with self._database.read() as session:
            return _require(session, trajectory_id, tenant)

    def newest_of(self, episode_id: str, *, tenant: str) -> Trajectory | None:
        """Return the newest trajectory of an episode, if it has any."""
        query = select(Trajectory).where(Trajectory.episode_id == episode_id, Trajectory.tenant == tenant)
        with self._database.read() as session:
            return session.exec(query.order_by(col(Trajectory.id).desc()).limit(1)).first()

    def steps(self, trajectory_id: str, *, since: int = 0, with_token_ids: bool = True) -> list[Step]:
        """Return the steps so far from position `since` on, in order. Raises: UnknownTrajectory.

        Without token ids a long episode is read quickly; asking such a step for them raises.
        """
        with self._database.read() as session:
            query = select(Step).where(Step.trajectory_id == trajectory_id, col(Step.position) >= since)
            if not with_token_ids:
                query = query.options(defer(Step.prompt_token_ids), defer(Step.output_token_ids))
            steps = list(session.exec(query.order_by(col(Step.position))))
            if not steps:
                _require(session, trajectory_id)
            return steps

    def measure(self, trajectory_id: str, *, since: int = 0) -> Measures:
        """Return how long a trajectory is by now, from position `since` on."""
        with self._database.read() as session:
            return _measure(session, trajectory_id, since)

    def recorded_result(
        self, tool_name: str, arguments: dict[str, Any], *, tenant: str = "", user_id: str = ""
    ) -> str | None:
        """Return what a tool yielded when it was last called with these arguments in an episode that this person may
        be shown. Blocks: for a thread."""
        is_meant = (Trajectory.tenant == tenant, is_shown(self.scopes.of_episode()))
        with self._database.read() as session:
            return find_result(session, tool_name, arguments, is_meant, {"user_id": user_id})

    def rewards(self, trajectory_id: str) -> list[Reward]:
        """Return every reward it was given, oldest first. Raises: UnknownTrajectory."""
        with self._database.read() as session:
            _require(session, trajectory_id)
            query = select(Reward).where(Reward.trajectory_id == trajectory_id)
            return list(session.exec(query.order_by(col(Reward.id))))

    def effective_reward(self, trajectory_id: str) -> float | None:
        """Return the reward that counts: the newest of the most trusted source; None when there is none."""
        reward = self._find_reward(trajectory_id)
        if reward is None:
            self.get(trajectory_id)
        return reward

    def reward_for_weights(self, trajectory_id: str) -> float | None:
        """Return the reward that counts when only those who may teach the weights are heard."""
        with self._database.read() as session:
            reward = _effective_reward_of(col(Trajectory.id), counts=[reward_teaches(teaching_keys(session))])
            return session.scalar(select(reward).where(Trajectory.id == trajectory_id))

    def view(self, trajectory: Trajectory) -> TrajectoryView:
        """Return a trajectory with the reward that counts."""
        return self._with_reward(trajectory, self._find_reward(trajectory.id))

    def _find_reward(self, trajectory_id: str) -> float | None:
        ((reward,),) = self._database.fetch(_EFFECTIVE_REWARD, {"trajectory_id": trajectory_id})
        return reward

    def exemplary(self) -> Select:
        """The query for every trajectory that may be shown as an exemplar, and its scope: a success, trusted, not
        retired, and shown to somebody."""
        scope = self.scopes.of_exemplar()
        shown = (col(Trajectory.retired_at).is_(None), is_trusted(Trajectory), scope.is_not(None))
        return self.successes(scope).where(*shown)

    def successes(self, *more: ColumnElement[Any]) -> Select:
        """The query for finished successes that are not held out, and more columns of them. An episode whose answer
        somebody corrected counts as one, with the correction in place of the answer."""
        return select(Trajectory, *more).where(
            Trajectory.stage == TrajectoryStage.FINISHED,
            Trajectory.split != Split.HELD_OUT,
            or_(_effective_reward_of(col(Trajectory.id)) >= self.success_reward, _IS_CORRECTED),
        )

    def learnable(
        self,
        *,
        since: datetime | None = None,
        environment: str | None = None,
        environments: Collection[str] | None = None,
        is_for_weights: bool = False,
    ) -> list[Graded]:
        """Return what may be learned from: finished, rewarded, not held out, oldest first; of all tenants.

        With `since`, only what was closed or rewarded after it: feedback may come late. With `environments`, only
        episodes of those; `""` among them stands for live traffic. With `is_for_weights`, only rewards of those who may
        teach the weights count (memory/teaching.py).
        """
        query = select(Trajectory, Reward)
        if since is not None:
            later = aliased(Reward)
            is_rewarded_since = exists().where(later.trajectory_id == Trajectory.id, later.created_at > since)
            query = query.where(or_(col(Trajectory.closed_at) > since, is_rewarded_since))
        if environment is not None:
            query = query.where(Trajectory.environment == environment)
        if environments is not None:
            query = query.where(func.coalesce(Trajectory.environment, "").in_(environments))
        with self._database.read() as session:
            counts = [reward_teaches(teaching_keys(session))] if is_for_weights else []
            query = query.where(*_is_learnable(counts))
            rows = session.exec(query.order_by(col(Trajectory.id))).all()
        return [
            Graded(trajectory, reward.value, reward.value >= self.success_reward, _teacher_of(trajectory, reward))
            for trajectory, reward in rows
        ]

    def count_learnable(self, *, is_for_weights: bool = False) -> dict[str, int]:
        """Return how many episodes of each environment may be learned from, or by how many the weights may be taught;
        `""` stands for live traffic."""
        environment = func.coalesce(Trajectory.environment, "")
        with self._database.read() as session:
            counts = [reward_teaches(teaching_keys(session))] if is_for_weights else []
            query = select(environment, func.count()).select_from(Trajectory).join(Reward, and_(*_is_learnable(counts)))
            return dict(list(session.exec(query.group_by(environment))))

    def kept_back(self) -> set[tuple[str, str]]:
        """Return (tenant, task) of every held-out task that a client played, and (tenant, text) of it."""
        query = (
            select(Trajectory.tenant, Trajectory.task, Trajectory.task_text)
            .where(Trajectory.split == Split.HELD_OUT, col(Trajectory.environment).is_(None))
            .distinct()
        )
        with self._database.read() as session:
            return {(tenant, it) for tenant, task, text in session.exec(query) for it in (task, text) if it}

    def select(
        self,
        *,
        limit: int = 50,
        before_id: str | None = None,
        environment: str | None = None,
        split: Split | None = None,
        policy: int | None = None,
        stage: TrajectoryStage | None = None,
        is_success: bool | None = None,
        since: datetime | None = None,
        tenant: str = "",
        is_for_weights: bool = False,
        user_id: str | None = None,
    ) -> list[TrajectoryView]:
        """Return trajectories with their rewards, newest first; pass the last id as `before_id` for the next page.
        With `since`, only what was opened after it; with `is_for_weights`, with the rewards of those who may teach the
        weights."""
        counts = []
        if is_for_weights:
            with self._database.read() as session:
                counts.append(reward_teaches(teaching_keys(session)))
        reward = _effective_reward_of(col(Trajectory.id), counts=counts).label("reward")
        query = select(Trajectory, reward).where(Trajectory.tenant == tenant)
        if before_id is not None:
            query = query.where(col(Trajectory.id) < before_id)
        if since is not None:
            query = query.where(col(Trajectory.opened_at) > since)
        for column, wanted in (
            (Trajectory.environment, environment),
            (Trajectory.split, split),
            (Trajectory.policy, policy),
            (Trajectory.stage, stage),
            (Trajectory.user_id, user_id),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        if is_success is not None:
            query = query.where(reward >= self.success_reward if is_success else reward < self.success_reward)
        with self._database.read() as session:
            rows = session.exec(query.order_by(col(Trajectory.id).desc()).limit(limit)).all()
        return [self._with_reward(trajectory, value) for trajectory, value in rows]

    def _with_reward(self, trajectory: Trajectory, reward: float | None) -> TrajectoryView:
        return TrajectoryView(trajectory, reward, None if reward is None else reward >= self.success_reward)

    def _refused_trajectory(self, trajectory: Trajectory) -> Exception:
        """Find out why it could not be opened."""
        with self._database.read() as session:
            if session.get(Policy, trajectory.policy) is None:
                return UnknownPolicy(f"no policy has version {trajectory.policy!r}: register it before it acts")
        return ValueError(f"trajectory {trajectory.id!r} exists: open another with a new id")

    def _refused_step(self, step: Step) -> Exception:
        """Find out why the guarded insert took no row."""
        with self._database.read() as session:
            trajectory = session.get(Trajectory, step.trajectory_id)
            if trajectory is None:
                return UnknownTrajectory(f"no trajectory has the id {step.trajectory_id!r}: open it first")
            if trajectory.stage is not TrajectoryStage.RUNNING:
                stage = trajectory.stage.value
                return IllegalMove(
                    f"trajectory {trajectory.id!r} is {stage!r}: a closed trajectory takes no more steps"
                )
            expected = session.scalar(select(_next_position(literal(step.trajectory_id))))
        place = f"step {step.position!r} of trajectory {step.trajectory_id!r}"
        return ValueError(f"{place} is out of order: the next position is {expected}")


def measure(steps: Iterable[Step]) -> Measures:
    """Return how long these steps are, with their tokens, as `Trajectories.measure` would once they are rows."""
    steps = list(steps)
    return Measures(
        num_steps=len(steps),
        num_model_calls=sum(step.kind is StepKind.MODEL for step in steps),
        prompt_tokens=sum(len(step.prompt_token_ids or ()) for step in steps),
        output_tokens=sum(len(step.output_token_ids or ()) for step in steps),
    )


def check_reward(value: float) -> None:
    """Raise ValueError unless `value` is a number in [0, 1]."""
    is_number = isinstance(value, int | float)
    if not is_number or not 0.0 <= value <= 1.0:
        raise ValueError(f"a reward is a number from 0 to 1, not {value!r}: rescale it")


def _require(session: Session, trajectory_id: str, tenant: str | None = None) -> Trajectory:
    trajectory = session.get(Trajectory, trajectory_id)
    if trajectory is None or tenant not in (None, trajectory.tenant):
        raise UnknownTrajectory(f"no trajectory has the id {trajectory_id!r}: list them to see which exist")
    return trajectory


def _measure(session: Session, trajectory_id: str, since: int = 0) -> Measures:
    values = {"trajectory_id": trajectory_id, "since": since}
    num_steps, num_model_calls, prompt_bytes, output_bytes = session.execute(_SUMS, values).one()
    return Measures(num_steps, num_model_calls, prompt_bytes // BYTES_PER_TOKEN_ID, output_bytes // BYTES_PER_TOKEN_ID)


def _close(session: Session, trajectory: Trajectory, stage: TrajectoryStage, error: str | None) -> None:
    if stage not in LEGAL_MOVES[trajectory.stage]:
        raise IllegalMove(f"trajectory {trajectory.id!r} cannot go from {trajectory.stage.value!r} to {stage.value!r}")
    size = _measure(session, trajectory.id)
    trajectory.stage = stage
    trajectory.error = error
    trajectory.num_steps = size.num_steps
    trajectory.prompt_tokens = size.prompt_tokens
    trajectory.output_tokens = size.output_tokens
    trajectory.closed_at = now()


def _last_handover(digest: str | None = None, before: datetime | None = None):
    """The query for ids of trajectories whose last model step is a handover, with this digest and before this time."""
    later = aliased(Step)
    is_answered = exists().where(
        later.trajectory_id == Step.trajectory_id, later.position > Step.position, later.kind == StepKind.MODEL
    )
    query = select(Step.trajectory_id).where(col(Step.handover_digest).is_not(None), ~is_answered)
    if digest is not None:
        query = query.where(Step.handover_digest == digest)
    if before is not None:
        query = query.where(col(Step.created_at) < before)
    return query


def _outcome_of(trajectory: Trajectory) -> str:
    """Return the stage it ended in, or `truncated`: finished because a budget or somebody's patience was."""
    is_truncated = trajectory.stage is TrajectoryStage.FINISHED and trajectory.error is not None
    return "truncated" if is_truncated else trajectory.stage.value


def _is_learnable(counts: list[ColumnElement[bool]]) -> list[ColumnElement[bool]]:
    """The conditions that join each trajectory that may be learned from with the reward that counts for that."""
    return [
        Trajectory.stage == TrajectoryStage.FINISHED,
        Trajectory.split != Split.HELD_OUT,
        Reward.trajectory_id == Trajectory.id,
        col(Reward.id) == _effective_reward_of(col(Trajectory.id), "id", counts),
    ]


def _teacher_of(trajectory: Trajectory, reward: Reward) -> Teacher:
    if reward.source is RewardSource.ENVIRONMENT:
        return Teacher(trajectory.tenant, trajectory.key_id, trajectory.user_id, is_environment=True)
    return Teacher(trajectory.tenant, reward.key_id, reward.user_id)


def _effective_reward_of(
    trajectory_id, column: str = "value", counts: Sequence[ColumnElement[bool]] = ()
) -> ScalarSelect[Any]:
    """The scalar subquery behind `effective_reward`; evaluated per row, so a page costs a page. `counts` narrows down
    whose rewards are looked at."""
    rank = case({source: place for place, source in enumerate(TRUST)}, value=col(Reward.source))
    return (
        select(getattr(Reward, column))
        .where(Reward.trajectory_id == trajectory_id, *counts)
        .order_by(rank, col(Reward.id).desc())
        .limit(1)
        .correlate(Trajectory)  # alone: the query around it may select rewards of its own
        .scalar_subquery()
    )


def _next_position(trajectory_id):
    query = select(func.coalesce(func.max(Step.position), -1) + 1).where(Step.trajectory_id == trajectory_id)
    return query.scalar_subquery()


def _build_step_insert():
    """One guarded statement, compiled once: it takes a row only while the trajectory runs and the position is next."""
    columns = Step.__table__.columns
    trajectory_id = bindparam("trajectory_id", type_=columns["trajectory_id"].type)
    is_running = exists().where(Trajectory.id == trajectory_id, Trajectory.stage == TrajectoryStage.RUNNING)
    is_next = bindparam("position", type_=columns["position"].type) == _next_position(trajectory_id)
    values = select(*(bindparam(column.name, type_=column.type) for column in columns)).where(is_running, is_next)
    inserted = insert(Step).from_select([column.name for column in columns], values)
    return inserted.execution_options(preserve_rowcount=True)  # else gone on PostgreSQL when the writer has it


_HAS_CORRECTION = exists().where(col(Feedback.correction).is_not(None))
_IS_CORRECTED = _HAS_CORRECTION.where(Feedback.trajectory_id == Trajectory.id).correlate(Trajectory)
_IS_THIS_CORRECTED = select(_HAS_CORRECTION.where(Feedback.trajectory_id == bindparam("trajectory_id")))
_INSERT_TRAJECTORY = insert(Trajectory).execution_options(preserve_rowcount=True)
_INSERT_STEP = _build_step_insert()
_EFFECTIVE_REWARD = select(_effective_reward_of(bindparam("trajectory_id")))
_SUMS = select(
    func.count(),
    func.coalesce(func.sum(case((Step.kind == StepKind.MODEL, 1), else_=0)), 0),
    func.coalesce(func.sum(func.length(Step.prompt_token_ids)), 0),
    func.coalesce(func.sum(func.length(Step.output_token_ids)), 0),
).where(Step.trajectory_id == bindparam("trajectory_id"), col(Step.position) >= bindparam("since"))
