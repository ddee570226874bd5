"""A turn: one request of a client and what the agent made of it, ready to be put into the words of either API.

Refuses to know those words, and how a turn is played.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from memory.records.trajectories import TrajectorySize, measure
from memory.schema import Step, StepKind, Trajectory, TrajectoryStage
from memory.store import Memory
from runtime.agent.state import Episode
from runtime.api.openai.answer_ids import name_answer


class EpisodeSummary(BaseModel):
    """What became of the episode so far: the extension object `ratchet` of an answer."""

    trajectory_id: str
    episode_id: str
    policy: str
    stage: TrajectoryStage
    reward: float | None
    success: bool | None
    num_steps: int
    num_turns: int
    prompt_tokens: int
    output_tokens: int
    num_invalid_tool_calls: int
    error: str | None


class Opened:
    """Where a turn is recorded, once it is: handed to the rollout, which calls it then."""

    def __init__(self) -> None:
        self.episode: Episode | None = None
        self.first_position = 0

    def __call__(self, episode: Episode) -> None:
        self.episode = episode
        self.first_position = episode.num_recorded

    @property
    def trajectory(self) -> Trajectory | None:
        return self.episode and self.episode.trajectory

    @property
    def steps(self) -> Sequence[Step]:
        """Of this turn."""
        return self.episode.steps if self.episode else ()

    @property
    def num_tokens(self) -> int:
        """Used in this turn so far, by model calls that ended."""
        return self.episode.budget.num_tokens if self.episode else 0

    @property
    def logprobs(self) -> list[dict[str, Any]]:
        """Of the tokens of the last reply; in no row, so they are had here or never."""
        reply = self.episode and self.episode.reply
        return reply.logprobs if reply else []


@dataclass(frozen=True)
class Turn:
    """A turn that is over: its trajectory, closed or waiting for the client, and the steps that are this turn's."""

    trajectory: Trajectory
    first_position: int
    steps: Sequence[Step]
    size: TrajectorySize
    episode_size: TrajectorySize
    reward: float | None
    is_success: bool | None
    logprobs: list[dict[str, Any]]

    @property
    def answer_id(self) -> str:
        return name_answer(self.trajectory.id, self.first_position)

    @property
    def last_call(self) -> Step | None:
        """The last model call, if there was one."""
        return next((step for step in reversed(self.steps) if step.kind is StepKind.MODEL), None)

    def output_room(self, context_tokens: int | None) -> int | None:
        """Return how many tokens the context left for the last reply; None where that is not known."""
        if context_tokens is None or self.last_call is None:
            return None
        return context_tokens - len(self.last_call.prompt_token_ids)

    @property
    def content(self) -> str | None:
        if self.trajectory.stage is TrajectoryStage.RUNNING:
            return self.last_call.content if self.last_call is not None else None
        return self.trajectory.answer

    @property
    def open_tool_calls(self) -> list[dict[str, Any]]:
        """The tool calls that nobody here ran: the client's to run."""
        if self.trajectory.stage is not TrajectoryStage.RUNNING or self.last_call is None:
            return []
        run_here = {step.tool_call_id for step in self.steps if step.position > self.last_call.position}
        return [call for call in self.last_call.tool_calls if call["id"] not in run_here]

    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        if self.open_tool_calls:
            return "tool_calls"
        is_cut = self.last_call is not None and self.last_call.finish_reason == "length"
        return "length" if is_cut or self.trajectory.error else "stop"

    def played(self) -> EpisodeSummary:
        trajectory = self.trajectory
        return EpisodeSummary(
            trajectory_id=trajectory.id,
            episode_id=trajectory.episode_id,
            policy=f"v{trajectory.policy}",
            stage=trajectory.stage,
            reward=self.reward,
            success=self.is_success,
            num_steps=self.episode_size.num_steps,
            num_turns=self.episode_size.num_model_calls,
            prompt_tokens=self.episode_size.prompt_tokens,
            output_tokens=self.episode_size.output_tokens,
            num_invalid_tool_calls=trajectory.num_invalid_tool_calls,
            error=trajectory.error,
        )


def read_turn(memory: Memory, trajectory: Trajectory, opened: Opened) -> Turn:
    """Return a turn that is over: its own steps as they were recorded, the rest as the rows have it."""
    trajectories, first_position = memory.trajectories, opened.first_position
    steps = opened.steps
    size = measure(steps)
    worth = trajectories.with_reward(trajectory)
    return Turn(
        trajectory=trajectory,
        first_position=first_position,
        steps=steps,
        size=size,
        episode_size=trajectories.measure(trajectory.id) if first_position else size,
        reward=worth.reward,
        is_success=worth.is_success,
        logprobs=opened.logprobs,
    )
