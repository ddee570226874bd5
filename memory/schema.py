"""The database schema: tasks, trajectories, rewards, feedback, insights, documents, policies, cycles, examples, keys.

These rows are the only source of truth; vectors and full-text tables are indexes that can be rebuilt from them.

Invariants: a stage moves only along `LEGAL_MOVES`; records of what happened are only added to. Trajectories, feedback,
insights, documents and examples belong to one tenant, `""` being the default one; policies and cycles are shared by all
tenants.
"""

# SQLModel declares __tablename__ as a declared_attr, although a plain string is its documented use.
# pyright: reportAssignmentType=false

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from array import array
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Enum,
    Index,
    Integer,
    LargeBinary,
    Row,
    String,
    TypeDecorator,
    UniqueConstraint,
    text,
    true,
)
from sqlmodel import Field, SQLModel

from memory.formats.content import ExampleKind
from memory.team import Role

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ID = re.compile(r"[a-z]+_([0-9a-f]{12})[0-9a-f]{16}")
_latest_sequence = 0
_advanced_ns = time.monotonic_ns()
_sequence_lock = threading.Lock()


def next_sequence() -> int:
    """Return a strictly increasing number, the only clock of the rows: the microseconds since 1970.

    It orders rows, so it survives the system clock going backwards, within a process and over a restart
    (`memory/storage/sequence.py`). While it is ahead of the system clock it runs at half the pace, so that durations
    still mean something and the system clock catches up.
    """
    global _latest_sequence, _advanced_ns
    with _sequence_lock:
        moment_ns = time.monotonic_ns()
        least = _latest_sequence + max(1, (moment_ns - _advanced_ns) // 2_000)
        _latest_sequence, _advanced_ns = max(time.time_ns() // 1_000, least), moment_ns
        return _latest_sequence


def advance_sequence(last: int) -> None:
    """Make every later number higher than `last`, and every later time later than that one."""
    global _latest_sequence, _advanced_ns
    with _sequence_lock:
        _latest_sequence, _advanced_ns = max(_latest_sequence, last), time.monotonic_ns()


def new_id(prefix: str) -> str:
    """Return a unique id that sorts behind all earlier ones.

    The form is `<prefix>_<12 hex digits of milliseconds><3 of microseconds><13 random ones>`, by the sequence.
    """
    milliseconds, microseconds = divmod(next_sequence(), 1_000)
    return f"{prefix}_{milliseconds:012x}{microseconds:03x}{secrets.randbits(52):013x}"


def sequence_of(row_id: str) -> int:
    """Return an upper bound of an id's sequence number; 0 for an id of another form.

    The bound is the end of the millisecond, because ids of earlier versions have random digits behind it.
    """
    match = _ID.fullmatch(row_id)
    return (int(match[1], 16) + 1) * 1_000 if match else 0


def sequence_at(moment: datetime) -> int:
    """Return the sequence number of a time."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def now() -> datetime:
    """Return the time in UTC by the rows' clock: later than every time before it, also those of earlier processes."""
    return _EPOCH + timedelta(microseconds=next_sequence())


class UtcDateTime(TypeDecorator):
    """A column of UTC times. SQLite stores no time zone, so it is stripped on writing and restored on reading."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC).replace(tzinfo=None) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None else None


class TokenIds(TypeDecorator):
    """A list of token ids, stored as little-endian uint32 bytes."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: list[int] | None, dialect: Dialect) -> bytes | None:
        # "I" is the native byte order: little-endian on every platform that vLLM runs on.
        return array("I", value).tobytes() if value is not None else None

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> list[int] | None:
        return array("I", value).tolist() if value is not None else None


class Logprobs(TypeDecorator):
    """A list of log-probs in nats, stored as little-endian float32 bytes."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: list[float] | None, dialect: Dialect) -> bytes | None:
        return array("f", value).tobytes() if value is not None else None

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> list[float] | None:
        return array("f", value).tolist() if value is not None else None


LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def clean(text: str) -> str:
    """Return a text that every database and encoding accepts: NUL and lone surrogates become U+FFFD.

    Models emit lone surrogates in JSON escapes; a pair of them is joined into its character.
    """
    text = text.replace("\x00", "\ufffd")
    if text.isascii() or LONE_SURROGATE.search(text) is None:
        return text
    text = SURROGATE_PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    # numpy, because a codec's error handler, and `sub`, take seconds for megabytes of surrogates.
    import numpy as np

    # numpy stores four bytes for each character, so that the text is an array of code points
    codes = np.array([text]).view(np.uint32)
    codes[(codes >> 11) == 0xD800 >> 11] = ord("\ufffd")
    return str(codes.view(f"U{len(text)}")[0])


class CleanText(TypeDecorator):
    """A text column whose values are passed through `clean`."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value if value is None else clean(value)


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def dump_json(value: object) -> str:
    """Return readable JSON that every database accepts: no escapes, no lone surrogates, NaN and infinities as strings.

    Raises: TypeError for a value that JSON cannot represent.
    """
    try:
        text = _JSON.encode(value)
    except ValueError:  # NaN or an infinity
        text = _JSON.encode(json.loads(json.dumps(value), parse_constant=str))
    return clean(text)


def enum_column(enum_class: type[StrEnum]) -> Enum:
    """Return a column type that stores the values of an enum rather than its Python names."""
    # length: PostgreSQL rejects a longer value, so a longer member needs a migration
    return Enum(enum_class, values_callable=lambda members: [m.value for m in members], native_enum=False, length=16)


class Split(StrEnum):
    """The use of a task. Held-out tasks are for measuring only: nothing may be learned from them."""

    LIVE = "live"
    PRACTICE = "practice"
    HELD_OUT = "held-out"


class TrajectoryStage(StrEnum):
    """The stage of a trajectory; all but RUNNING are final."""

    RUNNING = "running"
    FINISHED = "finished"  # reached its end; whether it succeeded is a matter of its reward
    FAILED = "failed"
    CANCELLED = "cancelled"


class Trust(StrEnum):
    """The trust in a text. A row made of several others has the least trust among them."""

    TRUSTED = "trusted"
    UNTRUSTED = "untrusted"  # influenced by a web page, an MCP server or a user's document


class PolicyStage(StrEnum):
    """The stage of a policy."""

    DRAFT = "draft"  # used only by requests that name it; an intermediate result (the SFT reference) stays here
    CANDIDATE = "candidate"
    CANARY = "canary"
    ACTIVE = "active"
    RETIRED = "retired"
    REJECTED = "rejected"


class CycleStage(StrEnum):
    """The first stage of a cycle, and its outcomes. Those in between belong to its methods of learning."""

    COLLECT = "collect"
    COMPLETED = "completed"
    ERROR = "error"


LEGAL_MOVES: dict[StrEnum, frozenset[StrEnum]] = {
    TrajectoryStage.RUNNING: frozenset({TrajectoryStage.FINISHED, TrajectoryStage.FAILED, TrajectoryStage.CANCELLED}),
    TrajectoryStage.FINISHED: frozenset(),
    TrajectoryStage.FAILED: frozenset(),
    TrajectoryStage.CANCELLED: frozenset(),
    PolicyStage.DRAFT: frozenset({PolicyStage.CANDIDATE, PolicyStage.ACTIVE, PolicyStage.REJECTED}),
    PolicyStage.CANDIDATE: frozenset({PolicyStage.CANARY, PolicyStage.ACTIVE, PolicyStage.REJECTED}),
    PolicyStage.CANARY: frozenset({PolicyStage.ACTIVE, PolicyStage.REJECTED}),
    PolicyStage.ACTIVE: frozenset({PolicyStage.RETIRED}),
    PolicyStage.RETIRED: frozenset({PolicyStage.ACTIVE}),
    # CANDIDATE for another comparison on new tasks; ACTIVE by an operator's explicit promotion.
    PolicyStage.REJECTED: frozenset({PolicyStage.CANDIDATE, PolicyStage.ACTIVE}),
}


@dataclass(frozen=True)
class Task:
    """A task. Lessons carry over between tasks of the same `kind`; `name` is unique within its environment."""

    environment: str | None
    """None for a task of a client, which this server cannot play again."""
    name: str
    kind: str
    split: Split
    text: str = ""


# Every change of a table, of this one and of those below, needs a revision in memory/storage/migrations/versions.
class Trajectory(SQLModel, table=True):
    """The stored record of one episode. Its policy and its memory segment are fixed when it opens."""

    __tablename__ = "trajectories"
    __table_args__ = (
        Index("trajectories_by_task", "environment", "task"),
        Index("trajectories_by_stage", "stage", "closed_at"),
        Index("trajectories_by_tenant", "tenant", "id"),
        Index("trajectories_by_user", "tenant", "user_id"),
        # Partial indexes: few rows have a value, and each write would pay for all.
        Index(
            "trajectories_by_reply",
            "reply_digest",
            sqlite_where=text("reply_digest IS NOT NULL"),
            postgresql_where=text("reply_digest IS NOT NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    tenant: str = ""
    user_id: str = ""
    """The person whom the client named; empty where none was named."""
    key_id: str | None = None
    """The API key of the request."""
    is_shared: bool = False
    """Whether the client shares it with the whole tenant, because it contains no person's words."""
    trust: Trust = Field(default=Trust.TRUSTED, sa_type=enum_column(Trust))
    reply_digest: str | None = None
    """Digest of an untrusted episode's reply: a later conversation that contains the reply is untrusted, too."""
    episode_id: str = Field(index=True)
    environment: str | None = None  # None for a client's own task, which cannot be played again
    task: str | None = None
    kind: str = "chat"
    split: Split = Field(default=Split.LIVE, sa_type=enum_column(Split))
    task_text: str = Field(default="", sa_type=CleanText)
    policy: int = Field(foreign_key="policies.version")
    stage: TrajectoryStage = Field(default=TrajectoryStage.RUNNING, sa_type=enum_column(TrajectoryStage))
    opening: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    """The messages of the first model call, without the memory segment."""
    tools: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    """Tool definitions in OpenAI's form."""
    memory_text: str = Field(default="", sa_type=CleanText)
    """The memory segment exactly as it was shown; empty without one."""
    memory_ids: list[str] = Field(default_factory=list, sa_column=Column(JSON))
    """Ids of the insights, exemplars and passages in `memory_text`, in order."""
    temperature: float | None = None
    answer: str | None = Field(default=None, sa_type=CleanText)
    error: str | None = Field(default=None, sa_type=CleanText)
    """`<ErrorClass>: <message>` of a FAILED trajectory; the limit that truncated a FINISHED one."""
    num_steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_invalid_tool_calls: int = 0
    opened_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    closed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    exemplar_text: str | None = Field(default=None, sa_type=CleanText)
    """An operator's wording of the exemplar, shown instead of the recorded steps."""
    approved_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When an operator approved it as an exemplar for the whole tenant. Only after that may an untrusted trajectory be
    shown and learned from."""
    retired_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When an operator retired it: it is not shown from then on."""
    branch_of: str | None = None
    """The trajectory whose beginning this one replays; None for an episode of its own. A branch is never shown, and
    only the method of learning that played it learns from it: its beginning is evidence elsewhere already."""
    branch_position: int | None = None
    """Position of the first step that is not replayed. The replayed steps before it have no token ids."""

    @property
    def task_key(self) -> tuple[str, str, str]:
        """The key that is equal for two episodes of the same task.

        A request without a task name is identified by its text. The tenant is included, because two tenants may use the
        same name for different tasks.
        """
        return (self.tenant, self.environment or "", self.task or self.task_text)

    @property
    def is_trusted(self) -> bool:
        """Whether memory may show it: it is trusted, or it was approved."""
        return self.trust is Trust.TRUSTED or self.approved_at is not None

    @property
    def may_teach(self) -> bool:
        """Whether weights and insights may be learned from its recorded steps."""
        return may_teach(self)


def may_teach(trajectory: Trajectory | Row[Any]) -> bool:
    """Whether weights and insights may be learned from the recorded steps of a trajectory, or of a row of its columns.

    Where an operator approved a reworded exemplar, only the new wording was approved.
    """
    is_approved = trajectory.approved_at is not None and trajectory.exemplar_text is None
    return trajectory.trust is Trust.TRUSTED or is_approved


class StepKind(StrEnum):
    """The kind of a step."""

    MODEL = "model"
    TOOL = "tool"
    USER = "user"  # a client's message beside the results of its tools, or a checker's note to the actor


class Step(SQLModel, table=True):
    """One model call or one tool result, durable before the next one starts."""

    __tablename__ = "steps"
    __table_args__ = (
        Index(
            "steps_by_handover",
            "handover_digest",
            sqlite_where=text("handover_digest IS NOT NULL"),
            postgresql_where=text("handover_digest IS NOT NULL"),
        ),
    )

    trajectory_id: str = Field(foreign_key="trajectories.id", primary_key=True)
    position: int = Field(primary_key=True)  # 0, 1, 2, ... without gaps
    kind: StepKind = Field(sa_type=enum_column(StepKind))
    content: str = Field(default="", sa_type=CleanText)
    tool_calls: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    tool_name: str | None = Field(default=None, sa_type=CleanText)
    tool_call_id: str | None = Field(default=None, sa_type=CleanText)
    error: str | None = Field(default=None, sa_type=CleanText)
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = Field(default=None, sa_type=TokenIds)
    output_token_ids: list[int] | None = Field(default=None, sa_type=TokenIds)
    output_logprobs: list[float] | None = Field(default=None, sa_type=Logprobs)
    """With which the engine sampled each output token; None where they were not requested."""
    seconds: float = 0.0
    handover_digest: str | None = None
    """Set on a reply that hands tool calls to the client: digest of the beginning that its next request must have."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    role: Role | None = Field(default=None, sa_type=enum_column(Role))
    """Of a team's model call, and of a checker's note to the actor; None for a single agent."""


class StoredResponse(SQLModel, table=True):
    """An answer of the Responses API, stored so that a client can read and continue it."""

    __tablename__ = "responses"

    id: str = Field(primary_key=True)
    tenant: str = ""
    trajectory_id: str = Field(foreign_key="trajectories.id", index=True)
    previous_id: str | None = None
    """The response that this one continues; no foreign key, because that one may be deleted."""
    input: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    """The input items of this request only."""
    body: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))
    """The response as it was sent."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class RewardSource(StrEnum):
    """The source of a reward; `memory.records.trajectory_queries.REWARD_TRUST` orders them by trust."""

    ENVIRONMENT = "environment"
    JUDGE = "judge"
    USER = "user"
    CODE = "code"
    VERIFIER = "verifier"
    """A model that was trained here on the others' rewards. It counts for rows of training data alone."""


class Reward(SQLModel, table=True):
    """A number in [0, 1] with a source and a reason. Never changed: the newest of the most trusted source counts."""

    __tablename__ = "rewards"

    id: str = Field(primary_key=True)
    trajectory_id: str = Field(foreign_key="trajectories.id", index=True)
    value: float
    source: RewardSource = Field(sa_type=enum_column(RewardSource))
    reason: str = Field(default="", sa_type=CleanText)
    key_id: str | None = None
    """The API key of its feedback; None for an environment's reward, and on a server without keys."""
    user_id: str = ""
    """The person who gave its feedback, where one was named."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class Feedback(SQLModel, table=True):
    """Feedback of a person or a program on an episode, stored as it was posted."""

    __tablename__ = "feedback"

    tenant: str = Field(default="", primary_key=True)  # two tenants may choose the same id
    id: str = Field(primary_key=True)  # chosen by the client, for idempotency, or generated
    user_id: str = ""
    key_id: str | None = None
    """The API key of the post."""
    trajectory_id: str = Field(foreign_key="trajectories.id", index=True)
    target: str = Field(default="", sa_type=CleanText)
    """The id that the client gave: of an answer, a trajectory or an episode."""
    answer_start: int | None = None
    """Position of the first step of the named answer; None for feedback on the whole trajectory."""
    step: int | None = None
    """Position of the only step that the feedback is about, where the client gave one."""
    name: str = "reward"
    value: Any = Field(default=None, sa_column=Column(JSON))
    comment: str | None = Field(default=None, sa_type=CleanText)
    correction: str | None = Field(default=None, sa_type=CleanText)
    """The answer as it should have been: a demonstration."""
    source: str = "user"
    tags: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON))
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    sequence: int = Field(default_factory=next_sequence, sa_type=BigInteger)
    """The order of arrival, which survives the system clock going backwards."""


class Insight(SQLModel, table=True):
    """A lesson in words, for one kind of task, with ExpeL's strength and the counts that support it."""

    __tablename__ = "insights"
    # Removed and retired insights count, too: their texts stay taken.
    __table_args__ = (UniqueConstraint("tenant", "user_id", "environment", "kind", "text"),)

    id: str = Field(primary_key=True)
    tenant: str = ""
    user_id: str = ""
    """The person from whose episodes it was learned; empty for an insight of the whole tenant."""
    trust: Trust = Field(default=Trust.TRUSTED, sa_type=enum_column(Trust))
    environment: str
    kind: str
    text: str = Field(sa_type=CleanText)
    strength: int = 2
    wins: int = 0
    """Number of successful episodes that followed the insight."""
    losses: int = 0
    """Number of unsuccessful episodes that followed the insight."""
    wins_otherwise: int = 0
    losses_otherwise: int = 0
    is_shared: bool = False
    """Whether it was learned only from live episodes that their clients share with the whole tenant."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    removed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    approved_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When an operator approved it for the whole tenant. From then on evidence does not change its text, and untrusted
    sources do not keep it from being shown."""
    retired_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When an operator retired it: no evidence brings its text back."""

    @property
    def is_trusted(self) -> bool:
        """Whether it may be shown: it is trusted, or it was approved."""
        return self.trust is Trust.TRUSTED or self.approved_at is not None


class ReviewKind(StrEnum):
    """An operator's decision about a memory."""

    APPROVE = "approve"
    EDIT = "edit"
    RETIRE = "retire"


class Review(SQLModel, table=True):
    """One decision of an operator about one memory, with its key and time. Never changed."""

    __tablename__ = "reviews"

    id: str = Field(primary_key=True)
    tenant: str = ""
    key_id: str | None = None
    """The API key of the decision; None on a server without keys."""
    kind: ReviewKind = Field(sa_type=enum_column(ReviewKind))
    row_id: str = Field(index=True)
    """The insight, or the exemplar's trajectory."""
    user_id: str = ""
    """The person whose memory it was before; empty for one of the tenant, or of nobody."""
    text: str | None = Field(default=None, sa_type=CleanText)
    """The operator's wording, where one was given."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class ReadEpisode(SQLModel, table=True):
    """An episode whose lessons a critic has extracted: it counts as evidence once."""

    __tablename__ = "read_episodes"

    trajectory_id: str = Field(foreign_key="trajectories.id", primary_key=True)
    reading: str = Field(primary_key=True)
    """compared | won | lost: the group of episodes in which it was read."""


class Document(SQLModel, table=True):
    """A document given to the agent. Replaced as a whole when its content changes."""

    __tablename__ = "documents"
    __table_args__ = (UniqueConstraint("tenant", "title"),)

    id: str = Field(primary_key=True)
    tenant: str = ""
    title: str = Field(sa_type=CleanText)
    digest: str
    trust: Trust = Field(default=Trust.TRUSTED, sa_type=enum_column(Trust))
    """UNTRUSTED for a document of a user for whom no operator vouches."""
    is_whole: bool = Field(default=True, sa_column_kwargs={"server_default": true()})
    """False while its passages are written or deleted in batches. Such a document is never shown."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class Passage(SQLModel, table=True):
    """A piece of a document, small enough to be shown."""

    __tablename__ = "passages"

    id: str = Field(primary_key=True)
    document_id: str = Field(foreign_key="documents.id", index=True)
    position: int
    text: str = Field(sa_type=CleanText)


class Policy(SQLModel, table=True):
    """A policy: base model, adapter or none, system prompt. Only its stage, verdict and `use_memory` change."""

    __tablename__ = "policies"
    __table_args__ = (
        # The database itself allows a single active policy, whatever process writes.
        Index(
            "one_active_policy",
            "stage",
            unique=True,
            sqlite_where=text("stage = 'active'"),
            postgresql_where=text("stage = 'active'"),
        ),
    )

    version: int = Field(primary_key=True)  # 0 is the bare base; never reused
    stage: PolicyStage = Field(sa_type=enum_column(PolicyStage))
    base_model: str
    adapter_path: str | None = None
    adapter_digest: str | None = None
    system_prompt: str | None = Field(default=None, sa_type=CleanText)
    """None: the environment's own, or the runtime's default."""
    parent: int | None = Field(default=None, foreign_key="policies.version")
    cycle_id: str | None = None
    note: str = Field(default="", sa_type=CleanText)
    verdict: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    use_memory: bool | None = None
    """Whether it uses memory by default, when a request does not say; None for the server's setting."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)

    @property
    def name(self) -> str:
        """The version in the form of the API, `v3`."""
        return f"v{self.version}"


class Activation(SQLModel, table=True):
    """One activation of a policy. The newest is in force; `previous` is the one that a rollback restores."""

    __tablename__ = "activations"

    id: int | None = Field(default=None, primary_key=True)
    version: int = Field(foreign_key="policies.version")
    previous: int | None = Field(default=None, foreign_key="activations.id")
    is_rollback: bool = False
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class StoredVerdict(SQLModel, table=True):
    """One comparison of a candidate with the active policy, stored before its outcome is known.

    The look numbers of one incumbent are the order in which its error budget was spent. An unfinished comparison keeps
    its look number, because abandoning one that goes badly must not be free.
    """

    __tablename__ = "verdicts"
    __table_args__ = (UniqueConstraint("incumbent", "look"),)

    id: str = Field(primary_key=True)
    candidate: int = Field(foreign_key="policies.version")
    incumbent: int = Field(foreign_key="policies.version")
    cycle_id: str | None = None
    environment: str = ""
    """The environment of the tasks; empty for tasks that clients played."""
    look: int | None = None
    """1 for the first comparison with this incumbent, 2 for the next; None when it ended without a test."""
    alpha: float = 0.0
    """The error budget of this look: the probability of promoting a candidate that is no better."""
    held_out_end: int = 0
    """End of its block of held-out tasks; the next comparison starts there."""
    decision: str | None = None
    """None while the comparison runs."""
    tasks: list[str] = Field(default_factory=list, sa_column=Column(JSON))
    """The compared tasks; they do not count for this candidate again."""
    sealed_tasks: int = 0
    """Number of tasks of the sealed block that its final report played; 0 when the block was not used."""
    sealed_successes: float = 0.0
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class Cycle(SQLModel, table=True):
    """One learning cycle: `stage` is its position, at which it resumes, `artifacts` the results of earlier stages."""

    __tablename__ = "cycles"

    id: str = Field(primary_key=True)
    stage: str = Field(default=CycleStage.COLLECT.value, max_length=16)
    """A `CycleStage`, or a stage of a method of learning."""
    settings: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))
    artifacts: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))
    progress: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))
    verdict: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    error: str | None = Field(default=None, sa_type=CleanText)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    closed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class Example(SQLModel, table=True):
    """A row of training data that was imported: text without token ids, which the policy's chat template renders.

    It is no episode: it was not played here, so no insight, exemplar or figure is ever made of it.
    """

    __tablename__ = "examples"
    __table_args__ = (
        UniqueConstraint("tenant", "digest"),
        Index("examples_by_kind", "tenant", "kind", "environment", "id"),
    )

    id: str = Field(primary_key=True)
    tenant: str = ""
    key_id: str | None = None
    """The API key of the import; weights learn from it only if that key may teach."""
    trust: Trust = Field(default=Trust.TRUSTED, sa_type=enum_column(Trust))
    digest: str
    """SHA-256 of what is learned from it; a tenant has each once."""
    kind: ExampleKind = Field(sa_type=enum_column(ExampleKind))
    environment: str = ""
    """Cycles of this environment learn from it; empty for those of live traffic."""
    task: str | None = Field(default=None, sa_type=CleanText)
    source: str = Field(default="", sa_type=CleanText)
    """The name that the importer gave: mostly that of the file."""
    format: str = ""
    prompt: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    """Never trained."""
    completion: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    """Its assistant messages are trained, those with weight 0 excepted."""
    rejected: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    is_good: bool | None = None
    reward: float | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    extra: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))
    """Fields of the imported row that are only kept to be exported again."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class Scope(StrEnum):
    """A permission of an API key."""

    INFER = "infer"
    FEEDBACK = "feedback"
    LEARN = "learn"
    TEACH = "teach"  # its feedback may teach the weights, which all tenants share; permits no route by itself
    ADMIN = "admin"  # permits the routes of all scopes above; teaches in the default tenant only


class ApiKey(SQLModel, table=True):
    """An API key: never the key itself, only the digest that identifies it."""

    __tablename__ = "api_keys"

    id: str = Field(primary_key=True)
    digest: str = Field(unique=True)
    """SHA-256 of the key, in hex."""
    name: str = Field(sa_type=CleanText)
    tenant: str = ""
    scopes: list[str] = Field(default_factory=list, sa_column=Column(JSON))
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    last_used_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """Accurate to the minute."""


class Outbox(SQLModel, table=True):
    """A row that the index has yet to read: written in the same transaction as the row that it names."""

    __tablename__ = "outbox"

    # PostgreSQL's INTEGER would overflow within a busy year; SQLite numbers rows by itself only for INTEGER.
    id: int | None = Field(
        default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer(), "sqlite"), nullable=False
    )
    collection: str  # insights | exemplars | passages
    row_id: str
    is_removed: bool = False
    is_in_text_index: bool = False
    """Whether the text index holds it. The row is deleted when the vector index does, too."""
