"""Working memory during one episode: what changes from node to node, and what is fixed when it opens.

Refuses to know the order of the nodes. `EpisodeState` is LangGraph's state; `Episode` is its context, alive as long as
the episode and never stored: the record of an episode is its trajectory.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from memory.schema import Task, Trajectory
from memory.store import Memory
from runtime.completion import Completion, Message, OnDelta
from runtime.environments.base import Playthrough
from runtime.errors import BudgetExceeded
from runtime.policy import Actor
from runtime.tools.base import Tool


class EpisodeState(TypedDict, total=False):
    """What the nodes hand on."""

    messages: Annotated[list[Message], operator.add]
    calls: list[dict[str, Any]]
    """Tool calls of the last reply, still to be run here."""
    answer: str | None
    """Set when the episode is over."""


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


@dataclass
class Episode:
    """One episode under way: who acts, on what, with which tools, and how far it got."""

    memory: Memory
    actor: Actor
    episode_id: str
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
    trajectory: Trajectory | None = None
    """None until it is open."""
    num_recorded: int = 0
    num_invalid_tool_calls: int = 0
    answer: str | None = None

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
