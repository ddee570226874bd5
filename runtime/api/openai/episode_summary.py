"""The extension object `ratchet` of an answer: the record of the episode so far."""

from __future__ import annotations

from pydantic import BaseModel

from memory.schema import TrajectoryStage
from runtime.agent.turn import Turn


class EpisodeSummary(BaseModel):
    """State of the episode after this turn; counts and tokens are the whole episode's."""

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


def summarize(turn: Turn) -> EpisodeSummary:
    """Return the state of the turn's episode."""
    trajectory, size = turn.trajectory, turn.episode_size
    return EpisodeSummary(
        trajectory_id=trajectory.id,
        episode_id=trajectory.episode_id,
        policy=f"v{trajectory.policy}",
        stage=trajectory.stage,
        reward=turn.reward,
        success=turn.is_success,
        num_steps=size.num_steps,
        num_turns=size.num_model_calls,  # the field's old name stays: it is part of the API
        prompt_tokens=size.prompt_tokens,
        output_tokens=size.output_tokens,
        num_invalid_tool_calls=trajectory.num_invalid_tool_calls,
        error=trajectory.error,
    )
