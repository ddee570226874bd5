"""The working state of one turn: `EpisodeState` is LangGraph's state, `Episode` its context.

Invariant: neither is stored; the record of an episode is its trajectory. Hazard: LangGraph merges what a node returns
into the state, but hands `Episode` to every node as the same object, so nodes change it in place.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from memory.schema import Step, Trajectory
from memory.store import Memory
from memory.team import Role
from runtime.agent.client_stream import BufferedStream
from runtime.agent.resume import Resumption
from runtime.agent.turn import TurnRequest, TurnStart
from runtime.engine.client import Completion, Message, ToolCall, ToolDefinition
from runtime.environments.base import Playthrough
from runtime.errors import BudgetExceeded, EngineLost
from runtime.observability.telemetry import Telemetry
from runtime.serving.policy import LeasedPolicy
from runtime.tools.base import Tool


class EpisodeState(TypedDict, total=False):
    """The values that nodes pass on."""

    # The reducer appends: a node that returned the whole list would double the prompt.
    messages: Annotated[list[Message], operator.add]
    """The prompt of the next model call; a node returns only what it adds."""
    calls: list[ToolCall]
    """Tool calls of the last reply that the server still has to run."""
    is_over: bool
    """Whether the turn is over: with an answer, or with calls for the client to run."""
    is_unchecked: bool
    """Whether the checker has to read the answer first."""


@dataclass
class Budget:
    """The limits of one turn and its use of them."""

    max_steps: int
    max_total_tokens: int
    max_output_tokens: int
    num_steps: int = 0
    num_tokens: int = 0

    def require(self) -> int:
        """Return how many tokens the next model call may write.

        Raises:
            BudgetExceeded: nothing is left for another call.
        """
        if self.num_steps >= self.max_steps:
            raise BudgetExceeded(f"no answer within {self.max_steps} steps")
        if self.num_tokens >= self.max_total_tokens:
            raise BudgetExceeded(f"no answer within {self.max_total_tokens} tokens")
        # The prompt is not known yet, so the total may be exceeded by one call's prompt.
        return min(self.max_output_tokens, self.max_total_tokens - self.num_tokens)

    @property
    def has_capacity(self) -> bool:
        """Whether another model call may be made."""
        return self.num_steps < self.max_steps and self.num_tokens < self.max_total_tokens

    def spend(self, completion: Completion) -> None:
        """Count one model call and its tokens."""
        self.charge(completion.num_tokens)

    def charge(self, num_tokens: int) -> None:
        """Count one model call of so many tokens, prompt and output."""
        self.num_steps += 1
        self.num_tokens += num_tokens


@dataclass(frozen=True)
class UncheckedAnswer:
    """An answer that neither the environment nor the client has read, because the checker has not accepted it."""

    reply: Completion
    stream: BufferedStream | None
    """Its deltas; None without a stream, and for an answer that was sent back, which the client must not see whole."""


@dataclass
class Episode:
    """An episode during one turn. The agent makes it from a `TurnRequest` and ends it as a `Turn`; the nodes read and
    change it, nothing else does."""

    request: TurnRequest
    memory: Memory
    telemetry: Telemetry
    leased: LeasedPolicy
    reader: str
    """The person whose own memories may be shown in it; empty: nobody's."""
    episode_id: str
    trajectory_id: str
    playthrough: Playthrough | None
    start_error: Exception | None
    """Why the environment did not start the task; raised once the trajectory is open."""
    opening: list[Message]
    """The messages before the first reply, system prompt included, without the memory that is shown."""
    task_text: str
    tools: Mapping[str, Tool]
    """The tools that the server runs, by name: the environment's or the server's."""
    budget: Budget
    use_memory: bool
    temperature: float
    sampling: Mapping[str, Any]
    """Further parameters of the actor's calls."""
    salts: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters of the planner's and checker's calls."""
    team: Sequence[Role] = ()
    """The roles of a team; empty for a single agent."""
    num_notes_left: int = 0
    """How often the checker may still send an answer back."""
    unchecked: UncheckedAnswer | None = None
    """The last answer that is not accepted."""
    buffered_stream: BufferedStream | None = None
    """The deltas of the reply that is being written, if it may be an answer to check."""
    resumption: Resumption | None = None
    """The state that the client continues from; None where the episode opens with this request."""
    trajectory: Trajectory | None = None
    """None until it is open."""
    first_position: int = 0
    """The position of this turn's first step."""
    steps: list[Step] = field(default_factory=list)
    """The steps of this turn that are durable."""
    num_invalid_tool_calls: int = 0
    """Of the whole episode."""
    text: str = ""
    """All text that the actor wrote in this turn, without answers that are unchecked."""
    reply: Completion | None = None
    """The actor's last reply."""
    is_handed_over: bool = False
    """Whether the client has calls of the last reply to run, for which the trajectory stays open."""
    lost: EngineLost | None = None
    """The engine's failure, while the episode waits for the engine to come back."""
    answer: str | None = None
    """The actor's last text, or what the environment said at the end of its task."""

    @property
    def visible_text(self) -> str:
        """The text that the client has received: with a stream all text of the turn, without one the last reply's."""
        return self.text if self.request.on_delta is not None or self.reply is None else self.reply.content

    @property
    def client_calls(self) -> list[ToolCall]:
        """The calls of the last reply that the client has to run."""
        calls = self.reply.tool_calls if self.reply is not None else []
        return [call for call in calls if call["function"]["name"] in self.client_tool_names]

    @property
    def record(self) -> Trajectory:
        """The trajectory, once it is open."""
        assert self.trajectory is not None
        return self.trajectory

    @property
    def role(self) -> Role | None:
        """The actor's role as its steps are recorded; None for a single agent."""
        return Role.ACTOR if self.team else None

    @property
    def all_steps(self) -> list[Step]:
        """The steps of all turns so far."""
        return [*(self.resumption.steps if self.resumption is not None else ()), *self.steps]

    @property
    def next_position(self) -> int:
        """The position of the next step in the trajectory."""
        return self.first_position + len(self.steps)

    @property
    def definitions(self) -> list[ToolDefinition]:
        """The definitions of all tools that the model may call."""
        # In a fixed order: templates write the tools into the prompt, whose beginning the prefix cache is keyed by.
        return [*(tool.definition() for tool in self.tools.values()), *self.request.tools]

    @property
    def client_tool_names(self) -> set[str]:
        return {tool["function"]["name"] for tool in self.request.tools}

    def announce(self) -> None:
        """Report that the record is open."""
        if self.request.on_start is not None:
            self.request.on_start(TurnStart(self.record, self.first_position))
