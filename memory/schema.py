"""The nouns, as rows: what was asked, what was lived, what was learned from it, and who acts now.

This module refuses to know how rows are written, found or shown. Text and truth live here; everything else
(vectors, word lists) is an index that can be rebuilt from these rows.

Invariants: rows are append-only except for a stage column, and a stage moves only along `LEGAL_MOVES`. What was lived,
said, read and learned in words belongs to one tenant; `""` is the default one. Policies and cycles are everybody's.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Enum,
    Index,
    Integer,
    LargeBinary,
    String,
    TypeDecorator,
    UniqueConstraint,
    text,
    true,
)
from sqlmodel import Field, SQLModel

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ID = re.compile(r"[a-z]+_([0-9a-f]{12})[0-9a-f]{16}")
_latest_ns = 0
_latest_sequence = 0
_sequence_lock = threading.Lock()


def _tick() -> int:
    """Return the time in nanoseconds, later each time within this process."""
    global _latest_ns
    _latest_ns = max(time.time_ns(), _latest_ns + 1_000)
    return _latest_ns


def next_sequence() -> int:
    """Return a number that is higher each time: the microseconds since 1970, or one more than the last number.

    It orders rows, and says nothing of the time: a clock that is set back must not turn what is newest, neither within
    a process nor over a restart (`memory/storage/sequence.py`).
    """
    global _latest_sequence
    with _sequence_lock:
        _latest_sequence = max(time.time_ns() // 1_000, _latest_sequence + 1)
        return _latest_sequence


def advance_sequence(last: int) -> None:
    """Have every number from now on be higher than `last`."""
    global _latest_sequence
    with _sequence_lock:
        _latest_sequence = max(_latest_sequence, last)


def new_id(prefix: str) -> str:
    """Return a unique id that sorts behind all earlier ones: `<prefix>_<12 hex of milliseconds><3 of microseconds><13
    random>`, by the sequence."""
    milliseconds, microseconds = divmod(next_sequence(), 1_000)
    return f"{prefix}_{milliseconds:012x}{microseconds:03x}{secrets.randbits(52):013x}"


def sequence_of(row_id: str) -> int:
    """Return a number that is at least the one an id was made with; 0 for an id that `new_id` did not make.

    Earlier versions had random digits behind the milliseconds, so the end of the millisecond is returned.
    """
    made = _ID.fullmatch(row_id)
    return (int(made[1], 16) + 1) * 1_000 if made else 0


def now() -> datetime:
    """Return the time. Within one process it never goes back, and no two moments are the same."""
    return _EPOCH + timedelta(microseconds=_tick() // 1_000)


class UtcDateTime(TypeDecorator):
    """SQLite forgets time zones; this column stores UTC and gives UTC back."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return value.astimezone(UTC).replace(tzinfo=None) if value is not None else None

    def process_result_value(self, value, dialect):
        return value.replace(tzinfo=UTC) if value is not None else None


class TokenIds(TypeDecorator):
    """A list of token ids, stored as little-endian uint32 bytes: exact, compact, readable by any language."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return array("I", value).tobytes() if value is not None else None

    def process_result_value(self, value, dialect):
        return array("I", value).tolist() if value is not None else None


HALF_CHARACTER = re.compile("[\ud800-\udfff]")
TWO_HALVES = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def clean(text: str) -> str:
    """Return text that can be stored and sent anywhere: NUL and half characters (models emit them in JSON escapes)
    become U+FFFD."""
    text = text.replace("\x00", "\ufffd")
    if text.isascii() or HALF_CHARACTER.search(text) is None:
        return text
    text = TWO_HALVES.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    # A codec's error handler, and `sub`, take seconds over megabytes of halves.
    import numpy as np

    codes = np.array([text]).view(np.uint32)
    codes[(codes >> 11) == 0xD800 >> 11] = ord("\ufffd")
    return str(codes.view(f"U{len(text)}")[0])


class CleanText(TypeDecorator):
    """Text from anywhere, made storable by `clean`."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return value if value is None else clean(value)


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def dump_json(value: Any) -> str:
    """Return JSON that reads well by hand and stores anywhere: no escapes, no half characters, NaN as a word."""
    try:
        text = _JSON.encode(value)
    except ValueError:  # what JSON has no number for is said in words
        text = _JSON.encode(json.loads(json.dumps(value), parse_constant=str))
    return clean(text)


def words_of(enum_class: type[StrEnum]) -> Enum:
    """Return a column type that stores an enum's values, the words people read, rather than its Python names."""
    return Enum(enum_class, values_callable=lambda members: [m.value for m in members], native_enum=False, length=16)


class Split(StrEnum):
    """Where a task comes from. Held-out tasks measure; nothing may ever be learned from them."""

    LIVE = "live"
    PRACTICE = "practice"
    HELD_OUT = "held-out"


class TrajectoryStage(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"  # it reached its end; success is a matter of reward
    FAILED = "failed"
    CANCELLED = "cancelled"


class Trust(StrEnum):
    """How far words may be believed. What is made of several rows has the least trust among them."""

    TRUSTED = "trusted"
    UNTRUSTED = "untrusted"  # text of a web page, an MCP server or a user's document had a part in it


def least(trusts: Iterable[Trust]) -> Trust:
    """Return the least trust among several; trusted where there are none."""
    return Trust.UNTRUSTED if any(trust is Trust.UNTRUSTED for trust in trusts) else Trust.TRUSTED


class PolicyStage(StrEnum):
    DRAFT = "draft"  # playable by its pin; an intermediate result (the SFT reference) stays here
    CANDIDATE = "candidate"
    CANARY = "canary"
    ACTIVE = "active"
    RETIRED = "retired"
    REJECTED = "rejected"


class CycleStage(StrEnum):
    """The stages of a cycle, in order; at the end, its outcome. Further methods of learning add stages of their own."""

    COLLECT = "collect"
    DEMONSTRATE = "demonstrate"
    SFT = "sft"
    EXPLORE = "explore"
    DPO = "dpo"
    EVALUATE = "evaluate"
    SETTLE = "settle"
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
    # Judged again on new tasks it is a candidate once more; ACTIVE otherwise only by an operator's explicit promotion.
    PolicyStage.REJECTED: frozenset({PolicyStage.CANDIDATE, PolicyStage.ACTIVE}),
}


@dataclass(frozen=True)
class Task:
    """What is asked. `kind` groups tasks that lessons carry over between; `name` is unique in its environment."""

    environment: str | None
    """None: a client's own, which it plays itself; nobody here can play it again."""
    name: str
    kind: str
    split: Split
    text: str = ""


class Trajectory(SQLModel, table=True):
    """The stored record of one episode. Its policy and its memory segment are fixed when it opens."""

    __tablename__ = "trajectories"
    __table_args__ = (
        Index("trajectories_by_task", "environment", "task"),
        Index("trajectories_by_stage", "stage", "closed_at"),
        Index("trajectories_by_tenant", "tenant", "id"),
        Index("trajectories_by_user", "tenant", "user_id"),
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
    """The person it was lived with, as the client names them; empty: nobody was named."""
    key_id: str | None = None
    """The API key it was asked with."""
    is_shared: bool = False
    """The client says that no person's words are in it: memory of it serves the whole tenant."""
    trust: Trust = Field(default=Trust.TRUSTED, sa_type=words_of(Trust))
    reply_digest: str | None = None
    """Of an untrusted episode's reply: a later conversation that contains this reply is untrusted, too."""
    episode_id: str = Field(index=True)
    environment: str | None = None  # None: asked by a client, not replayable
    task: str | None = None
    kind: str = "chat"
    split: Split = Field(default=Split.LIVE, sa_type=words_of(Split))
    task_text: str = Field(default="", sa_type=CleanText)
    policy: int = Field(foreign_key="policies.version")
    stage: TrajectoryStage = Field(default=TrajectoryStage.RUNNING, sa_type=words_of(TrajectoryStage))
    opening: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    """The messages the first model call saw, without the memory segment."""
    tools: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    """Tool definitions in OpenAI's form."""
    memory_text: str = Field(default="", sa_type=CleanText)
    """The memory segment exactly as it was shown; empty when nothing was."""
    memory_ids: list[str] = Field(default_factory=list, sa_column=Column(JSON))
    """Ids of the insights, exemplars and passages in `memory_text`, in order."""
    temperature: float | None = None
    answer: str | None = Field(default=None, sa_type=CleanText)
    error: str | None = Field(default=None, sa_type=CleanText)
    """`<ErrorClass>: <message>` of what ended a FAILED episode; the limit that ended a truncated FINISHED one."""
    num_steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_invalid_tool_calls: int = 0
    opened_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    closed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    exemplar_text: str | None = Field(default=None, sa_type=CleanText)
    """What an operator has it shown as, in place of what was said in it."""
    approved_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When an operator let the whole tenant see it as an exemplar. Only then may memory show, and weights learn, what
    is untrusted."""
    retired_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When an operator took it out of memory: nobody is shown it from then on."""

    @property
    def task_key(self) -> tuple[str, str, str]:
        """What makes two episodes tries at the same thing; a client's request that names no task is its own text.
        The tenant is part of it: two tenants may give the same name to different things."""
        return (self.tenant, self.environment or "", self.task or self.task_text)

    @property
    def is_trusted(self) -> bool:
        """Whether memory may show it: nothing untrusted is in it, or it was approved."""
        return self.trust is Trust.TRUSTED or self.approved_at is not None

    @property
    def may_teach(self) -> bool:
        """Whether weights and lessons may be made of what was said in it. Where an operator approved other words than
        those, only the other words were approved."""
        return self.trust is Trust.TRUSTED or (self.approved_at is not None and self.exemplar_text is None)


class StepKind(StrEnum):
    MODEL = "model"
    TOOL = "tool"
    USER = "user"  # what a client said together with the results of its tools


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
    kind: StepKind = Field(sa_type=words_of(StepKind))
    content: str = Field(default="", sa_type=CleanText)
    tool_calls: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    tool_name: str | None = Field(default=None, sa_type=CleanText)
    tool_call_id: str | None = Field(default=None, sa_type=CleanText)
    error: str | None = Field(default=None, sa_type=CleanText)
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = Field(default=None, sa_type=TokenIds)
    output_token_ids: list[int] | None = Field(default=None, sa_type=TokenIds)
    seconds: float = 0.0
    handover_digest: str | None = None
    """Set on a reply that hands tool calls over to the client: what its next request must begin with."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class StoredResponse(SQLModel, table=True):
    """An answer of the Responses API, kept so that a client can read it again and go on from it."""

    __tablename__ = "responses"

    id: str = Field(primary_key=True)
    tenant: str = ""
    trajectory_id: str = Field(foreign_key="trajectories.id", index=True)
    previous_id: str | None = None
    """The response this one went on from; not a foreign key, because that one may be deleted."""
    input: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON))
    """The items of this request alone."""
    body: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))
    """The response as it was sent."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class RewardSource(StrEnum):
    ENVIRONMENT = "environment"
    JUDGE = "judge"
    USER = "user"
    CODE = "code"


class Reward(SQLModel, table=True):
    """A number in [0, 1] with a source and a reason. Append-only; the newest of the most trusted source counts."""

    __tablename__ = "rewards"

    id: str = Field(primary_key=True)
    trajectory_id: str = Field(foreign_key="trajectories.id", index=True)
    value: float
    source: RewardSource = Field(sa_type=words_of(RewardSource))
    reason: str = Field(default="", sa_type=CleanText)
    key_id: str | None = None
    """The API key of the feedback that it comes from; None for an environment's, and without keys."""
    user_id: str = ""
    """The person whose feedback it comes from, where one was named."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class Feedback(SQLModel, table=True):
    """What a human or a program said of an episode, kept as it was posted."""

    __tablename__ = "feedback"

    tenant: str = Field(default="", primary_key=True)  # two tenants may choose the same id
    id: str = Field(primary_key=True)  # the poster's, for idempotency, or ours
    user_id: str = ""
    key_id: str | None = None
    """The API key it was posted with."""
    trajectory_id: str = Field(foreign_key="trajectories.id", index=True)
    target: str = Field(default="", sa_type=CleanText)
    """What the poster named: an answer, a trajectory or an episode."""
    answer_start: int | None = None
    """The step at which the answer begins that was named; None where the whole trajectory was."""
    step: int | None = None
    """The one step that is meant, where the poster said so; then nothing is said of the rest."""
    name: str = "reward"
    value: Any = Field(default=None, sa_column=Column(JSON))
    comment: str | None = Field(default=None, sa_type=CleanText)
    correction: str | None = Field(default=None, sa_type=CleanText)
    """What the answer should have been: a demonstration."""
    source: str = "user"
    tags: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON))
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    sequence: int = Field(default_factory=next_sequence, sa_type=BigInteger)
    """The order in which pieces of feedback came; the time may be set back."""


class Insight(SQLModel, table=True):
    """A lesson in words, for one kind of task, with ExpeL's strength and the counts that support it."""

    __tablename__ = "insights"
    __table_args__ = (UniqueConstraint("tenant", "user_id", "environment", "kind", "text"),)

    id: str = Field(primary_key=True)
    tenant: str = ""
    user_id: str = ""
    """The person whose words it was made of; empty: it may serve the whole tenant."""
    trust: Trust = Field(default=Trust.TRUSTED, sa_type=words_of(Trust))
    environment: str
    kind: str
    text: str = Field(sa_type=CleanText)
    strength: int = 2
    wins: int = 0
    """Successful episodes that did what the insight says."""
    losses: int = 0
    """Unsuccessful episodes that did what the insight says."""
    wins_otherwise: int = 0
    losses_otherwise: int = 0
    is_shared: bool = False
    """Made of live episodes that their clients share with the whole tenant, and of nothing else."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    removed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    approved_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When an operator let the whole tenant see it; its words are the operator's from then on, and shown although what
    they were made of is untrusted."""
    retired_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    """When an operator removed it: no evidence brings these words back."""

    @property
    def is_trusted(self) -> bool:
        """Whether it may be shown: nothing untrusted is in it, or it was approved."""
        return self.trust is Trust.TRUSTED or self.approved_at is not None


class ReviewKind(StrEnum):
    APPROVE = "approve"
    EDIT = "edit"
    RETIRE = "retire"


class Review(SQLModel, table=True):
    """One decision of an operator about one memory: who made it and when. Append-only."""

    __tablename__ = "reviews"

    id: str = Field(primary_key=True)
    tenant: str = ""
    key_id: str | None = None
    """The API key it was made with; None on a server without keys."""
    kind: ReviewKind = Field(sa_type=words_of(ReviewKind))
    row_id: str = Field(index=True)
    """The insight, or the exemplar's trajectory."""
    user_id: str = ""
    """The person whose memory it was until then; empty: the tenant's, or nobody's."""
    text: str | None = Field(default=None, sa_type=CleanText)
    """The operator's wording, where one was given."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class ReadEpisode(SQLModel, table=True):
    """An episode that a critic has read and whose lessons were applied: it is evidence once in each kind of reading."""

    __tablename__ = "read_episodes"

    trajectory_id: str = Field(foreign_key="trajectories.id", primary_key=True)
    reading: str = Field(primary_key=True)
    """compared | won | lost: what it was read next to."""


class Document(SQLModel, table=True):
    """Something the agent was given to read. Replaced as a whole when its content changes."""

    __tablename__ = "documents"
    __table_args__ = (UniqueConstraint("tenant", "title"),)

    id: str = Field(primary_key=True)
    tenant: str = ""
    title: str = Field(sa_type=CleanText)
    digest: str
    trust: Trust = Field(default=Trust.TRUSTED, sa_type=words_of(Trust))
    """Untrusted: a person wrote it for whom no operator answers."""
    is_whole: bool = Field(default=True, sa_column_kwargs={"server_default": true()})
    """False while its passages are written or deleted in batches. Nobody is shown such a document."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class Passage(SQLModel, table=True):
    """A piece of a document, small enough to show."""

    __tablename__ = "passages"

    id: str = Field(primary_key=True)
    document_id: str = Field(foreign_key="documents.id", index=True)
    position: int
    text: str = Field(sa_type=CleanText)


class Policy(SQLModel, table=True):
    """What acts: base model, adapter or none, system prompt. Immutable but for its stage and verdict."""

    __tablename__ = "policies"
    __table_args__ = (
        Index(
            "one_active_policy",
            "stage",
            unique=True,
            sqlite_where=text("stage = 'active'"),
            postgresql_where=text("stage = 'active'"),
        ),
    )

    version: int = Field(primary_key=True)  # 0 is the bare base; never reused
    stage: PolicyStage = Field(sa_type=words_of(PolicyStage))
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
    """Whether it serves with memory where a request does not say; None: the server's setting."""
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)

    @property
    def name(self) -> str:
        return f"v{self.version}"


class Activation(SQLModel, table=True):
    """One moment at which a policy went live. The newest is now; `previous` is the one a rollback leads back to."""

    __tablename__ = "activations"

    id: int | None = Field(default=None, primary_key=True)
    version: int = Field(foreign_key="policies.version")
    previous: int | None = Field(default=None, foreign_key="activations.id")
    is_rollback: bool = False
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class StoredVerdict(SQLModel, table=True):
    """One comparison of a candidate with the active policy, written before its outcome is known.

    The look numbers of one incumbent are the order in which its error budget was spent. A comparison that was begun
    and never finished keeps its look: abandoning one that goes badly must not be free.
    """

    __tablename__ = "verdicts"
    __table_args__ = (UniqueConstraint("incumbent", "look"),)

    id: str = Field(primary_key=True)
    candidate: int = Field(foreign_key="policies.version")
    incumbent: int = Field(foreign_key="policies.version")
    cycle_id: str | None = None
    environment: str = ""
    """Where the tasks were played; empty: clients played them."""
    look: int | None = None
    """1 for the first comparison with this incumbent, 2 for the next; None: it ended without a test."""
    alpha: float = 0.0
    """How likely this look was to promote a candidate that is no better."""
    held_out_end: int = 0
    """The end of its block of held-out tasks; the next comparison starts there."""
    decision: str | None = None
    """None while it is under way."""
    tasks: list[str] = Field(default_factory=list, sa_column=Column(JSON))
    """The tasks that were compared; they do not count for this candidate again."""
    sealed_tasks: int = 0
    """Tasks of the sealed block that its final report played; 0: the block was not touched."""
    sealed_successes: float = 0.0
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class Cycle(SQLModel, table=True):
    """One learning cycle: `stage` is its position, at which it resumes, `artifacts` the results of earlier stages."""

    __tablename__ = "cycles"

    id: str = Field(primary_key=True)
    stage: str = Field(default=CycleStage.COLLECT.value, max_length=16)
    """A `CycleStage`, or a stage of a further method."""
    settings: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))
    artifacts: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))
    progress: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))
    verdict: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    error: str | None = Field(default=None, sa_type=CleanText)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    closed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class Scope(StrEnum):
    """What a key may be used for."""

    INFER = "infer"
    FEEDBACK = "feedback"
    LEARN = "learn"
    TEACH = "teach"  # its feedback counts for the weights, which all tenants share; opens no route by itself
    ADMIN = "admin"  # opens what all of the above open; teaches in the default tenant only


class ApiKey(SQLModel, table=True):
    """A key as it is kept: never the key itself, only the digest by which it is known again."""

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
    """To the minute."""


class Outbox(SQLModel, table=True):
    """What the index has yet to follow: written in the same transaction as the row it speaks of."""

    __tablename__ = "outbox"

    # PostgreSQL's Integer would run out within a busy year; SQLite's alone numbers its rows by itself.
    id: int | None = Field(
        default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer(), "sqlite"), nullable=False
    )
    collection: str  # insights | exemplars | passages
    row_id: str
    is_removed: bool = False
    is_worded: bool = False
    """The word index holds it; the row leaves when the index of meanings does too."""
