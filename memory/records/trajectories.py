"""Episodic memory: trajectories from the first message to the last reward, each step durable before the next.

A trajectory is opened, takes steps, and is closed; rewards may be added before or after the close. A `tenant` of None,
where an argument allows it, means every tenant: for the server's own work, never for a client's request.

Invariants: a closed trajectory takes no more steps; positions have no gaps; held-out trajectories never become
exemplars or lessons; rewards are only added, never changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, exists, func, literal, or_
from sqlalchemy import select as sql_select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased, defer
from sqlmodel import Session, col, select

from memory.errors import IllegalMove, UnknownPolicy, UnknownTrajectory
from memory.held_out import normalize_text
from memory.records.tool_results import find_result
from memory.records.trajectory_queries import (
    EFFECTIVE_REWARD,
    INSERT_STEP,
    INSERT_TRAJECTORY,
    IS_CORRECTED,
    IS_ONE_CORRECTED,
    MODEL_CALLS,
    REWARD_TRUST,
    SIZE,
    TRAINING_TRUST,
    effective_reward_of,
    last_handover,
    learnable_conditions,
    next_position,
)
from memory.schema import (
    LEGAL_MOVES,
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
from memory.teaching import DEFAULT_TENANT, OPERATOR, Teacher, TeacherKind, reward_teaches, teaching_keys
from memory.trust import Exchange, digest_exchange, is_trusted, trust_of

# As memory.schema.TokenIds stores them.
BYTES_PER_TOKEN_ID = 4
TOKEN_COLUMNS: tuple[Any, ...] = (Step.prompt_token_ids, Step.output_token_ids, Step.output_logprobs)
UNLISTED_COLUMNS: tuple[Any, ...] = (Trajectory.opening, Trajectory.tools, Trajectory.memory_ids)
"""The JSON of a conversation, which takes long to parse and which no list shows."""


@dataclass(frozen=True)
class TrajectoryWithReward:
    """Any trajectory and its effective reward; both values are None without one. `Trajectories` makes it for lists."""

    trajectory: Trajectory
    reward: float | None
    is_success: bool | None


@dataclass(frozen=True)
class GradedTrajectory:
    """A finished, rewarded trajectory that may be learned from. `Trajectories.learnable` makes it."""

    trajectory: Trajectory
    steps: list[Step]
    """Empty as `learnable` returns it, because most callers choose before they read; `optimizer.rewards.grade` fills
    it."""
    reward: float
    is_success: bool
    teacher: Teacher = OPERATOR
    """The teacher that gave the reward."""
    source: RewardSource = RewardSource.ENVIRONMENT

    @property
    def model_steps(self) -> list[Step]:
        """The model calls among the steps."""
        return [step for step in self.steps if step.kind is StepKind.MODEL]


@dataclass(frozen=True)
class TrajectorySize:
    """The numbers of steps, of model calls and of tokens of a trajectory, or of a part of it."""

    num_steps: int
    num_model_calls: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class ModelCalls:
    """The number of model calls of a trajectory, and of those whose reply calls a tool, whoever runs it."""

    num: int
    num_calling_tools: int


class Trajectories:
    """All stored trajectories, with their steps and rewards."""

    def __init__(self, database: Database, *, success_reward: float = 1.0, scopes: Scopes | None = None) -> None:
        self._database = database
        self.scopes = scopes or Scopes()
        self.success_reward = success_reward
        self.num_closed: Counter[tuple[str, Split]] = Counter()
        """Number of trajectories closed since the start, by outcome and split."""

    async def open(self, trajectory: Trajectory) -> Trajectory:
        """Store a new trajectory; durable on return.

        Raises: UnknownPolicy; ValueError for an id that exists or a stage other than RUNNING.
        """
        if trajectory.stage is not TrajectoryStage.RUNNING:
            raise ValueError(f"a trajectory opens as 'running', not as {trajectory.stage.value!r}")
        try:
            await self._database.insert_row(INSERT_TRAJECTORY, vars(trajectory))
        except IntegrityError as error:  # the database does not tell which constraint in a portable way
            raise self._why_not_opened(trajectory) from error
        return trajectory

    async def append(self, step: Step, *, trajectory: Trajectory) -> None:
        """Store the next step; durable on return.

        Raises: UnknownTrajectory, IllegalMove when the trajectory is closed, ValueError for a position out of order.
        """
        if step.trajectory_id != trajectory.id:
            raise ValueError(f"step of {step.trajectory_id!r} cannot be appended to trajectory {trajectory.id!r}")
        # Not model_dump: it would copy thousands of token ids one by one.
        if not await self._database.insert_row(INSERT_STEP, vars(step)):
            raise self._why_not_appended(step)

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
        """Close the trajectory: store its size and its answer; a success becomes an exemplar.

        `reply` is the text that the client received, where it differs from `answer`: a stream holds every text of a
        turn.
        Raises: UnknownTrajectory; IllegalMove when it is closed already.
        """

        def write(session: Session) -> Trajectory:
            trajectory = _require(session, trajectory_id)
            _close(session, trajectory, TrajectoryStage(stage), error)
            # Only after `_close`, which raises for a closed trajectory: its answer must not change.
            trajectory.answer = answer
            trajectory.num_invalid_tool_calls = num_invalid_tool_calls
            # while the reply waits for its client, its digest is there already, and holds more than the answer
            if trajectory.reply_digest is None or not _is_waiting(session, trajectory):
                _note_reply(session, trajectory, reply or answer or "")
            session.add(trajectory)
            self.note_exemplar(session, trajectory)
            return trajectory

        closed = await self._database.write(write)  # counted only once it is durable
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
        """Add a reward, with its key and person, inside the caller's transaction.

        Raises: UnknownTrajectory; ValueError for a verifier's grade of a held-out task, which only measures.
        """
        trajectory = _require(session, trajectory_id)
        if source is RewardSource.VERIFIER and trajectory.split is Split.HELD_OUT:
            raise ValueError(f"trajectory {trajectory_id!r} is of a held-out task: no verifier may grade it")
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
        session.flush()  # `note_exemplar` reads the effective reward, this one included
        self.note_exemplar(session, trajectory)
        return reward

    def note_exemplar(self, session: Session, trajectory: Trajectory) -> None:
        """Queue a closed trajectory for the index if it may have become, or ceased to be, an exemplar."""
        if trajectory.stage is not TrajectoryStage.FINISHED or trajectory.split is Split.HELD_OUT:
            return
        if trajectory.branch_of is not None:
            return
        reward = session.scalar(EFFECTIVE_REWARD, {"trajectory_id": trajectory.id})
        is_corrected = session.scalar(IS_ONE_CORRECTED, {"trajectory_id": trajectory.id})
        if reward is not None or is_corrected:
            is_success = is_corrected or (reward is not None and reward >= self.success_reward)
            session.add(Outbox(collection="exemplars", row_id=trajectory.id, is_removed=not is_success))

    async def distrust(self, trajectory_id: str) -> None:
        """Mark a trajectory as untrusted; call it before untrusted text enters. Raises: UnknownTrajectory."""

        def write(session: Session) -> None:
            trajectory = _require(session, trajectory_id)
            trajectory.trust = Trust.UNTRUSTED
            session.add(trajectory)

        await self._database.write(write)

    async def approve(self, trajectory_id: str, *, tenant: str | None = None) -> Trajectory:
        """Allow memory to show, and weights to learn, an untrusted trajectory that an operator has read.

        Raises: UnknownTrajectory; IllegalMove while it is running, because more text may enter it.
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
        self,
        *,
        memory_ids: Sequence[str] = (),
        exchanges: Sequence[Exchange] = (),
        handover_digest: str | None = None,
        tenant: str = "",
    ) -> Trust:
        """Return the least trust among the memories shown in an episode, the exchanges before it, and the episodes that
        handed the conversation with this digest over to their client."""
        if not memory_ids and not exchanges and handover_digest is None:
            return Trust.TRUSTED
        with self._database.read() as session:
            return trust_of(
                session, memory_ids=memory_ids, exchanges=exchanges, handover_digest=handover_digest, tenant=tenant
            )

    async def note_handover(self, trajectory_id: str, *, reply: str, num_invalid_tool_calls: int) -> None:
        """Store the count on a running trajectory, for a resumed episode to continue, and by which `reply` it is found
        in a conversation if it is untrusted. Raises: UnknownTrajectory."""

        def write(session: Session) -> None:
            trajectory = _require(session, trajectory_id)
            trajectory.num_invalid_tool_calls = num_invalid_tool_calls
            _note_reply(session, trajectory, reply)
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
        """Return the running trajectories that wait for a client's tool results, oldest first."""
        handover = last_handover(handover_digest, handed_over_before)
        conditions: list[ColumnElement[bool]] = [col(Trajectory.stage) == TrajectoryStage.RUNNING]
        if episode_id is not None:
            conditions.append(col(Trajectory.episode_id) == episode_id)
        if tenant is not None:
            conditions.append(col(Trajectory.tenant) == tenant)
        with self._database.read() as session:
            if handover_digest is not None:
                # Two queries, so that SQLite starts from the few steps with this digest, not from all running rows.
                is_meant = exists().where(col(Trajectory.id) == Step.trajectory_id, *conditions)
                waiting = [session.get_one(Trajectory, each) for each in session.scalars(handover.where(is_meant))]
            else:
                is_waiting = handover.where(col(Step.trajectory_id) == Trajectory.id).exists()
                waiting = session.exec(select(Trajectory).where(*conditions, is_waiting)).all()
            return sorted(waiting, key=lambda trajectory: trajectory.id)

    async def close_orphans(self) -> int:
        """Close as FAILED the trajectories that a dead process left RUNNING; return how many.

        Call it at the start, before any trajectory is opened. Those that wait for a client stay open: their rows hold
        all that is needed to resume them.
        """

        def write(session: Session) -> list[Trajectory]:
            is_waiting = last_handover().where(col(Step.trajectory_id) == Trajectory.id).exists()
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
        """Return one trajectory. Raises: UnknownTrajectory, also for a trajectory of another tenant."""
        with self._database.read() as session:
            return _require(session, trajectory_id, tenant)

    def newest_of(self, episode_id: str, *, tenant: str) -> Trajectory | None:
        """Return the newest trajectory of an episode, if it has any."""
        query = select(Trajectory).where(Trajectory.episode_id == episode_id, Trajectory.tenant == tenant)
        with self._database.read() as session:
            return session.exec(query.order_by(col(Trajectory.id).desc()).limit(1)).first()

    def steps(self, trajectory_id: str, *, since: int = 0, with_token_ids: bool = True) -> list[Step]:
        """Return the steps so far from position `since` on, in order. Raises: UnknownTrajectory.

        Without token ids a long trajectory is read quickly. Hazard: reading the ids of such a step raises, because the
        row is detached.
        """
        with self._database.read() as session:
            query = select(Step).where(Step.trajectory_id == trajectory_id, col(Step.position) >= since)
            if not with_token_ids:
                query = query.options(*map(defer, TOKEN_COLUMNS))
            steps = list(session.exec(query.order_by(col(Step.position))))
            if not steps:  # a trajectory without steps, or an unknown id
                _require(session, trajectory_id)
            return steps

    def measure(self, trajectory_id: str, *, since: int = 0) -> TrajectorySize:
        """Return the size of a trajectory so far, from position `since` on; zeros for an unknown id."""
        with self._database.read() as session:
            return _measure(session, trajectory_id, since)

    def count_model_calls(self, trajectory_id: str) -> ModelCalls:
        """Return the numbers of model calls so far; zeros for an unknown id."""
        with self._database.read() as session:
            num, num_calling_tools = session.execute(MODEL_CALLS, {"trajectory_id": trajectory_id}).one()
            return ModelCalls(num, num_calling_tools)

    def recorded_result(
        self, tool_name: str, arguments: dict[str, Any], *, tenant: str = "", user_id: str = ""
    ) -> str | None:
        """Return the result of the last call of a tool with these arguments, in episodes that this person may be shown.

        None where there is none. Blocks: call it in a thread.
        """
        conditions = (col(Trajectory.tenant) == tenant, is_shown(self.scopes.of_episode()))
        with self._database.read() as session:
            return find_result(session, tool_name, arguments, conditions, {"user_id": user_id})

    def rewards(self, trajectory_id: str) -> list[Reward]:
        """Return all rewards of a trajectory, oldest first. Raises: UnknownTrajectory."""
        with self._database.read() as session:
            _require(session, trajectory_id)
            query = select(Reward).where(Reward.trajectory_id == trajectory_id)
            return list(session.exec(query.order_by(col(Reward.id))))

    def effective_reward(self, trajectory_id: str) -> float | None:
        """Return the newest reward of the most trusted source; None without rewards. Raises: UnknownTrajectory."""
        reward = self._find_reward(trajectory_id)
        if reward is None:
            self.get(trajectory_id)
        return reward

    def reward_for_weights(self, trajectory_id: str) -> float | None:
        """Return the effective reward among those that may teach the weights (memory/teaching.py).

        Never a verifier's: the release gate grades by this, and a model's grade proves nothing.
        """
        with self._database.read() as session:
            conditions = [reward_teaches(teaching_keys(session))]
            reward = effective_reward_of(col(Trajectory.id), conditions=conditions)
            return session.scalar(select(reward).where(col(Trajectory.id) == trajectory_id))

    def with_reward(self, trajectory: Trajectory) -> TrajectoryWithReward:
        """Return a trajectory with its effective reward."""
        return self._join(trajectory, self._find_reward(trajectory.id))

    def _find_reward(self, trajectory_id: str) -> float | None:
        ((reward,),) = self._database.fetch(EFFECTIVE_REWARD, {"trajectory_id": trajectory_id})
        return reward

    def exemplary(self) -> Select:
        """Return the query for (trajectory, scope) of all exemplars: trusted successes that are not retired and that
        somebody may be shown."""
        scope = self.scopes.of_exemplar()
        return self.successes(scope).where(
            col(Trajectory.retired_at).is_(None), is_trusted(Trajectory), scope.is_not(None)
        )

    def successes(self, *columns: ColumnElement[Any]) -> Select:
        """Return the query for finished successes that are neither held out nor branches, with further `columns`.

        An episode whose answer was corrected counts as a success, with the correction in place of the answer.
        """
        return sql_select(Trajectory, *columns).where(
            col(Trajectory.stage) == TrajectoryStage.FINISHED,
            col(Trajectory.split) != Split.HELD_OUT,
            col(Trajectory.branch_of).is_(None),
            or_(effective_reward_of(col(Trajectory.id)) >= self.success_reward, IS_CORRECTED),
        )

    def learnable(
        self,
        *,
        since: datetime | None = None,
        environment: str | None = None,
        environments: Collection[str] | None = None,
        is_for_weights: bool = False,
        with_branches: bool = False,
    ) -> list[GradedTrajectory]:
        """Return the trajectories of all tenants that may be learned from, oldest first, without their steps.

        They are finished, rewarded and not held out. With `since`, they were closed or rewarded after it, because
        feedback may come late. `environments` narrows them down; `""` among them stands for live traffic. With
        `is_for_weights`, only rewards that may teach the weights count (memory/teaching.py), and a verifier's grade
        where there is no other. Branches are no evidence of their own: they are left out unless `with_branches` asks
        for them.
        """
        query = select(Trajectory, Reward)
        if since is not None:
            later = aliased(Reward)
            is_rewarded_since = exists().where(col(later.trajectory_id) == Trajectory.id, col(later.created_at) > since)
            query = query.where(or_(col(Trajectory.closed_at) > since, is_rewarded_since))
        if environment is not None:
            query = query.where(Trajectory.environment == environment)
        if environments is not None:
            query = query.where(func.coalesce(Trajectory.environment, "").in_(environments))
        with self._database.read() as session:
            conditions = [reward_teaches(teaching_keys(session))] if is_for_weights else []
            sources = TRAINING_TRUST if is_for_weights else REWARD_TRUST
            query = query.where(*learnable_conditions(conditions, sources, with_branches=with_branches))
            rows = session.exec(query.order_by(col(Trajectory.id))).all()
        return [
            GradedTrajectory(
                trajectory,
                [],
                reward.value,
                reward.value >= self.success_reward,
                _teacher_of(trajectory, reward),
                reward.source,
            )
            for trajectory, reward in rows
        ]

    def count_learnable(self, *, is_for_weights: bool = False) -> dict[str, int]:
        """Return the number of learnable trajectories by environment; `""` stands for live traffic.

        With `is_for_weights`, only those whose reward may teach the weights.
        """
        environment = func.coalesce(Trajectory.environment, "")
        with self._database.read() as session:
            conditions = [reward_teaches(teaching_keys(session))] if is_for_weights else []
            is_learnable = and_(*learnable_conditions(conditions, TRAINING_TRUST))
            query = sql_select(environment, func.count()).select_from(Trajectory).join(Reward, is_learnable)
            return {name: num for name, num in session.execute(query.group_by(environment))}

    def ungraded(self, environments: Collection[str], *, limit: int) -> list[Trajectory]:
        """Return the newest episodes of the default tenant that a verifier may grade, oldest first: finished, trusted,
        not held out, without any reward or correction. `""` among the environments stands for live traffic."""
        has_reward = exists().where(col(Reward.trajectory_id) == Trajectory.id)
        query = select(Trajectory).where(
            Trajectory.stage == TrajectoryStage.FINISHED,
            Trajectory.split != Split.HELD_OUT,
            Trajectory.tenant == DEFAULT_TENANT,
            func.coalesce(Trajectory.environment, "").in_(environments),
            is_trusted(Trajectory),
            ~has_reward,
            ~IS_CORRECTED,
        )
        with self._database.read() as session:
            newest = session.exec(query.order_by(col(Trajectory.id).desc()).limit(limit)).all()
        return list(newest)[::-1]

    def held_out_tasks(self) -> set[tuple[str, str]]:
        """Return (tenant, task) and (tenant, task text), both normalized, of every held-out task that a client
        played."""
        query = (
            select(Trajectory.tenant, Trajectory.task, Trajectory.task_text)
            .where(Trajectory.split == Split.HELD_OUT, col(Trajectory.environment).is_(None))
            .distinct()
        )
        with self._database.read() as session:
            rows = session.exec(query).all()
        named = ((tenant, normalize_text(it or "")) for tenant, *names in rows for it in names)
        return {(tenant, it) for tenant, it in named if it}

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
    ) -> list[TrajectoryWithReward]:
        """Return trajectories with their rewards, newest first; pass the last id as `before_id` for the next page.

        With `since`, only those opened after it. With `is_for_weights`, only rewards that may teach the weights count.
        Hazard: reading one of `UNLISTED_COLUMNS` of such a row raises, because the row is detached.
        """
        conditions: list[ColumnElement[bool]] = []
        if is_for_weights:
            with self._database.read() as session:
                conditions.append(reward_teaches(teaching_keys(session)))
        reward = effective_reward_of(col(Trajectory.id), conditions=conditions).label("reward")
        query = select(Trajectory, reward).where(Trajectory.tenant == tenant).options(*map(defer, UNLISTED_COLUMNS))
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
            # without a reward the comparison is NULL: such a trajectory is neither a success nor a failure
            query = query.where(reward >= self.success_reward if is_success else reward < self.success_reward)
        with self._database.read() as session:
            rows = session.exec(query.order_by(col(Trajectory.id).desc()).limit(limit)).all()
        return [self._join(trajectory, value) for trajectory, value in rows]

    def _join(self, trajectory: Trajectory, reward: float | None) -> TrajectoryWithReward:
        return TrajectoryWithReward(trajectory, reward, None if reward is None else reward >= self.success_reward)

    def _why_not_opened(self, trajectory: Trajectory) -> Exception:
        """Return the error for an INSERT of a trajectory that violated a constraint."""
        with self._database.read() as session:
            if session.get(Policy, trajectory.policy) is None:
                return UnknownPolicy(f"no policy has version {trajectory.policy!r}: register it first")
        return ValueError(f"trajectory {trajectory.id!r} exists: open another with a new id")

    def _why_not_appended(self, step: Step) -> Exception:
        """Return the error for a guarded INSERT that added no row."""
        with self._database.read() as session:
            trajectory = session.get(Trajectory, step.trajectory_id)
            if trajectory is None:
                return UnknownTrajectory(f"no trajectory has the id {step.trajectory_id!r}: open it first")
            if trajectory.stage is not TrajectoryStage.RUNNING:
                stage = trajectory.stage.value
                return IllegalMove(
                    f"trajectory {trajectory.id!r} is {stage!r}: a closed trajectory takes no more steps"
                )
            expected = session.scalar(sql_select(next_position(literal(step.trajectory_id))))
        return ValueError(
            f"step {step.position!r} of trajectory {step.trajectory_id!r} is out of order: the next position is "
            f"{expected}"
        )


def measure(steps: Iterable[Step]) -> TrajectorySize:
    """Return the size of steps in memory, as `Trajectories.measure` does for stored ones."""
    steps = list(steps)
    return TrajectorySize(
        num_steps=len(steps),
        num_model_calls=sum(step.kind is StepKind.MODEL for step in steps),
        prompt_tokens=sum(len(step.prompt_token_ids or ()) for step in steps),
        output_tokens=sum(len(step.output_token_ids or ()) for step in steps),
    )


def check_reward(value: float) -> None:
    """Raises: ValueError unless `value` is a number in [0, 1]."""
    is_number = isinstance(value, int | float)
    # NaN fails the comparison, too; a bool is a number
    if not is_number or not 0.0 <= value <= 1.0:
        raise ValueError(f"a reward is a number from 0 to 1, not {value!r}: rescale it")


def _require(session: Session, trajectory_id: str, tenant: str | None = None) -> Trajectory:
    trajectory = session.get(Trajectory, trajectory_id)
    # one error for both: another tenant's id must not be told from an unknown one
    if trajectory is None or tenant not in (None, trajectory.tenant):
        raise UnknownTrajectory(f"no trajectory has the id {trajectory_id!r}: list them to see which exist")
    return trajectory


def _measure(session: Session, trajectory_id: str, since: int = 0) -> TrajectorySize:
    values = {"trajectory_id": trajectory_id, "since": since}
    steps, calls, prompt_bytes, output_bytes = session.execute(SIZE, values).one()
    return TrajectorySize(steps, calls, prompt_bytes // BYTES_PER_TOKEN_ID, output_bytes // BYTES_PER_TOKEN_ID)


def _close(session: Session, trajectory: Trajectory, stage: TrajectoryStage, error: str | None) -> None:
    if stage not in LEGAL_MOVES[trajectory.stage]:
        raise IllegalMove(f"trajectory {trajectory.id!r} cannot go from {trajectory.stage.value!r} to {stage.value!r}")
    # in the transaction that closes: no step can come after it is counted
    size = _measure(session, trajectory.id)
    trajectory.stage = stage
    trajectory.error = error
    trajectory.num_steps = size.num_steps
    trajectory.prompt_tokens = size.prompt_tokens
    trajectory.output_tokens = size.output_tokens
    trajectory.closed_at = now()


def _note_reply(session: Session, trajectory: Trajectory, reply: str) -> None:
    """Store by what a conversation is recognized that contains the reply of an untrusted trajectory."""
    if trajectory.trust is not Trust.UNTRUSTED or not reply:
        return
    query = sql_select(col(Step.content)).where(  # a checker's note has a role, and no client knows it
        col(Step.trajectory_id) == trajectory.id, col(Step.kind) == StepKind.USER, col(Step.role).is_(None)
    )
    request = session.scalar(query.order_by(col(Step.position).desc()).limit(1))
    request = trajectory.task_text if request is None else request
    trajectory.reply_digest = digest_exchange(trajectory.tenant, request, reply)


def _is_waiting(session: Session, trajectory: Trajectory) -> bool:
    return session.scalar(last_handover().where(col(Step.trajectory_id) == trajectory.id).limit(1)) is not None


def _outcome_of(trajectory: Trajectory) -> str:
    """Return the final stage, or `truncated` for one that finished at a limit of steps, tokens or time."""
    is_truncated = trajectory.stage is TrajectoryStage.FINISHED and trajectory.error is not None
    return "truncated" if is_truncated else trajectory.stage.value


def _teacher_of(trajectory: Trajectory, reward: Reward) -> Teacher:
    if reward.source is RewardSource.ENVIRONMENT:
        return Teacher(trajectory.tenant, trajectory.key_id, trajectory.user_id, TeacherKind.ENVIRONMENT)
    kind = TeacherKind.VERIFIER if reward.source is RewardSource.VERIFIER else TeacherKind.FEEDBACK
    return Teacher(trajectory.tenant, reward.key_id, reward.user_id, kind)
