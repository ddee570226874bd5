"""One turn, in and out: the request that `Agent.rollout` takes and the result that it returns.

    ChatRequest -> TurnRequest -> Episode -> Turn -> ChatCompletion

Invariant: all of these are values that go one way. A `TurnRequest` never changes, and a `Turn` is built once, when
everything in it is durable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from memory.records.trajectories import TrajectorySize
from memory.schema import Step, StepKind, Task, Trajectory, TrajectoryStage
from memory.team import is_actors
from runtime.agent.resume import digest, split_at_answer
from runtime.engine.client import Message, OnDelta, ToolCall, ToolDefinition


@dataclass(frozen=True)
class TurnStart:
    """The record that a turn is written to, and the position of the turn's first step in it.

    The agent makes it as soon as the record is open; the writer of a stream reads it, because the first event of a
    stream already holds the id of the answer.
    """

    trajectory: Trajectory
    first_position: int


@dataclass(frozen=True)
class BranchOrigin:
    """The recorded episode that a branch leaves, and its steps up to there, which are replayed."""

    trajectory: Trajectory
    steps: Sequence[Step]
    """They end before a model call: the one that the branch makes anew."""


@dataclass(frozen=True, kw_only=True)
class TurnRequest:
    """One request to the agent. The API and the composition root make it; only the agent reads it.

    It holds either a `task` of an environment, whose text opens the episode, or `messages`. A task without an
    environment beside `messages` only labels the record.
    """

    task: Task | None = None
    messages: Sequence[Message] = ()
    """The conversation as the client sent it, its last message last."""
    tools: Sequence[ToolDefinition] = ()
    """Definitions of tools that the client runs. A reply that calls one ends the turn, and the trajectory stays
    open."""
    tenant: str = ""
    """Owner of the episode: only this tenant's memory is shown in it, and only this tenant may read it."""
    user_id: str = ""
    """The person whom the request is made for; empty: not named."""
    key_id: str | None = None
    """The API key of the request."""
    origin: BranchOrigin | None = None
    """Set for a branch: its `task` is started again, these steps are replayed, and the policy plays on."""
    is_shared: bool = False
    """Whether the whole tenant may be shown memories of this episode."""
    untrusted_tools: frozenset[str] = frozenset()
    """Names of the client's tools whose results other people may have written: an episode with one of them is
    untrusted."""
    episode_id: str | None = None
    """None: a new id, or the one of the episode that `messages` continue."""
    policy: int | None = None
    """Version that must act; None: the active one, or the one that the episode began with."""
    use_memory: bool | None = None
    """None: as the policy serves, or else as the server does."""
    temperature: float | None = None
    """None: the environment's, or else the server's."""
    seed: int | None = None
    """Of the first model call; each further call adds one."""
    max_tokens: int | None = None
    """Limit of one model call, in tokens; None: the environment's, or else the server's."""
    keeps_logprobs: bool = False
    """Whether the record gets the log-prob with which each token was sampled, in all roles."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters that the engine is given unchanged."""
    on_start: Callable[[TurnStart], None] | None = None
    """Called once, when the record is open and before the first delta."""
    on_delta: OnDelta | None = None
    """Awaited with each piece of text, and of calls to the client's tools, as the model writes it."""
    on_usage: Callable[[int], None] | None = None
    """Called once with the tokens of all model calls of the turn, however it ended: a cancelled turn is
    charged too, with the tokens that its stream brought."""

    @cached_property
    def handover(self) -> tuple[str, Sequence[Message]] | None:
        """(digest of the messages up to the last reply, the messages after it); None if they continue no episode."""
        # kept: the time it takes grows with the conversation
        parts = split_at_answer(self.messages)
        return None if parts is None else (digest(parts[0]), parts[1])

    @property
    def environment(self) -> str | None:
        """The name of the environment whose task is to be played."""
        return self.task.environment if self.task is not None else None


@dataclass(frozen=True)
class Turn:
    """A turn that is over. The agent builds it; the writers of answers and the composition root read it.

    Its trajectory is closed, or RUNNING where the client has tool calls to run and is expected back.
    """

    trajectory: Trajectory
    first_position: int
    """Position of this turn's first step in the trajectory; 0 in the first turn of an episode."""
    steps: Sequence[Step]
    """The steps of this turn only."""
    size: TrajectorySize
    """Steps and tokens of this turn."""
    episode_size: TrajectorySize
    """Steps and tokens of the whole episode so far."""
    reward: float | None
    is_success: bool | None
    logprobs: list[dict[str, Any]]
    """Log-probs of the last reply's tokens. They are not stored, so they exist only here."""
    stop_sequence: str | None = None
    """The text of the request's `stop` that ended the last reply, if one did; not stored either."""

    @property
    def last_call(self) -> Step | None:
        """The last model call that wrote to the client, if there was one: not a team's plan or check."""
        calls = (step for step in reversed(self.steps) if step.kind is StepKind.MODEL and is_actors(step))
        return next(calls, None)

    @property
    def answer(self) -> str | None:
        """The text that the client reads: the trajectory's answer, or the reply that calls the client's tools."""
        if self.trajectory.stage is TrajectoryStage.RUNNING:
            return self.last_call.content if self.last_call is not None else None
        return self.trajectory.answer

    @property
    def open_tool_calls(self) -> list[ToolCall]:
        """The tool calls of the last reply that the client has to run."""
        if self.trajectory.stage is not TrajectoryStage.RUNNING or self.last_call is None:
            return []
        # By position: an earlier call of this turn may have had the same id.
        run_here = {step.tool_call_id for step in self.steps if step.position > self.last_call.position}
        return [call for call in self.last_call.tool_calls if call["id"] not in run_here]

    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        """The reason in OpenAI's terms."""
        # First: the arguments of a call that was cut are no JSON, and its client must not run it.
        if self.is_cut:
            return "length"
        if self.open_tool_calls:
            return "tool_calls"
        # FINISHED with an error means a spent budget; the API raises for a FAILED turn before it reads this.
        return "length" if self.trajectory.error else "stop"

    @property
    def is_cut(self) -> bool:
        """Whether the last reply ended at its limit of tokens, perhaps within a tool call."""
        return self.last_call is not None and self.last_call.finish_reason == "length"

    def output_capacity(self, context_tokens: int | None) -> int | None:
        """Return how many tokens the context left for the last reply; None: unknown."""
        if context_tokens is None or self.last_call is None:
            return None
        return context_tokens - len(self.last_call.prompt_token_ids or ())
