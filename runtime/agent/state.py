"""Working memory during one episode: what changes from node to node, and what is fixed when it opens.

Refuses to know the order of the nodes. `EpisodeState` is LangGraph's state; `Episode` is its context, alive as long as
the episode and never stored: the record of an episode is its trajectory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from memory.schema import Step, Task, Trajectory
from memory.store import Memory
from runtime.agent.resume import Resumption
from runtime.engine.client import Completion, Message, OnDelta
from runtime.environments.base import Playthrough
from runtime.errors import BudgetExceeded, EngineLost
from runtime.observability.telemetry import Telemetry
from runtime.serving.policy import Actor
from runtime.tools.base import Tool


class EpisodeState(TypedDict, total=False):
    """What the nodes hand on."""

    messages: Annotated[list[Message], operator.add]
    calls: list[dict[str, Any]]
    """Tool calls of the last reply, still to be run here."""
    is_handed_over: bool
    """Calls of the last reply are the client's to run: once ours are run, it is its turn."""
    answer: str | None
    """Set when the episode is over, or the client's turn has come."""


@dataclass
class Budget:
    """What one episode may spend, and what it has spent."""

    max_steps: int
    max_total_tokens: int
    max_output_tokens: int
    num_steps: int = 0
    num_tokens: int = 0

    def require(self) -> int:
        """Return how many tokens the next model call may write.

        Raises:
            BudgetExceeded: there is nothing left for another call.
        """
        if self.num_steps >= self.max_steps:
            raise BudgetExceeded(f"no answer within {self.max_steps} steps")
        if self.num_tokens >= self.max_total_tokens:
            raise BudgetExceeded(f"no answer within {self.max_total_tokens} tokens")
        return min(self.max_output_tokens, self.max_total_tokens - self.num_tokens)

    def spend(self, completion: Completion) -> None:
        self.num_steps += 1
        self.num_tokens += completion.num_tokens


OnOpen = Callable[["Episode"], None]


@dataclass
class Episode:
    """One episode under way: who acts, on what, with which tools, and how far it got."""

    memory: Memory
    telemetry: Telemetry
    actor: Actor
    tenant: str
    """Whose episode it is: what it may find, and who may ever see it."""
    user_id: str
    """The person it is played for; empty: nobody was named."""
    key_id: str | None
    is_shared: bool
    """Whether all of the tenant may be shown what is remembered of it."""
    reader: str
    """The person whose own memories may be shown in it; empty: nobody's."""
    episode_id: str
    trajectory_id: str
    task: Task | None
    playthrough: Playthrough | None
    opening: list[Message]
    task_text: str
    tools: Mapping[str, Tool]
    """Run here, by name: the environment's or the server's."""
    client_tools: Sequence[dict[str, Any]]
    """Definitions of the tools that the client runs."""
    budget: Budget
    use_memory: bool
    temperature: float
    seed: int | None
    sampling: Mapping[str, Any]
    on_delta: OnDelta | None
    on_open: OnOpen | None = None
    heard: Sequence[Message] = ()
    """The messages of the request as the client sent them."""
    resumption: Resumption | None = None
    """What the client comes back to; None where the episode opens with this request."""
    trajectory: Trajectory | None = None
    """None until it is open."""
    num_recorded: int = 0
    steps: list[Step] = field(default_factory=list)
    """Those of this turn that are durable."""
    num_invalid_tool_calls: int = 0
    said: str = ""
    """All text written in this turn."""
    reply: Completion | None = None
    """The last one."""
    is_handed_over: bool = False
    """Whether the client has calls to run: the trajectory stays open for it."""
    lost: EngineLost | None = None
    """What took the engine away, while the episode waits for it to come back."""
    answer: str | None = None

    @property
    def words_shown(self) -> str:
        """What the client has read as the answer: who listens hears all words of the turn, not the last reply alone."""
        return self.said if self.on_delta is not None or self.reply is None else self.reply.content

    def announce(self) -> None:
        """Tell who asked that the record is open, and where this turn begins in it."""
        if self.on_open is not None:
            self.on_open(self)

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """Every tool the model is told of."""
        return [*(tool.definition() for tool in self.tools.values()), *self.client_tools]

    @property
    def client_tool_names(self) -> set[str]:
        return {tool["function"]["name"] for tool in self.client_tools}

    @property
    def is_played_out(self) -> bool:
        """Whether the environment has spoken its last words."""
        return self.playthrough is not None and self.playthrough.is_done
