"""Chat completions as OpenAI writes them: a closed episode as one answer, or as the chunks of a stream.

Refuses to know how an episode is played and when it is over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from memory.schema import Step, StepKind, Trajectory, TrajectoryStage
from runtime.api.models import pin


class ToolFunction(BaseModel):
    """The name of a tool and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the client is to run."""

    id: str
    type: str = "function"
    function: ToolFunction


class Answer(BaseModel):
    """What the agent said."""

    role: str = "assistant"
    content: str | None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None


class Choice(BaseModel):
    """The one choice there is."""

    index: int = 0
    message: Answer
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: None = None


class Usage(BaseModel):
    """Tokens of all model calls of the episode together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Played(BaseModel):
    """What became of the episode: the extension object `ratchet` of an answer."""

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


class ChatCompletion(BaseModel):
    """An answer. Its `id` is the trajectory's, and the target of feedback."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    ratchet: Played


@dataclass(frozen=True)
class Episode:
    """A closed trajectory with what an answer says about it."""

    trajectory: Trajectory
    steps: list[Step]
    reward: float | None
    is_success: bool | None

    @property
    def last_call(self) -> Step | None:
        """The last model call, if there was one."""
        return next((step for step in reversed(self.steps) if step.kind is StepKind.MODEL), None)

    @property
    def open_tool_calls(self) -> list[dict[str, Any]]:
        """Tool calls that nobody here ran: the client's to run."""
        ends_with_call = bool(self.steps) and self.steps[-1].kind is StepKind.MODEL
        return self.steps[-1].tool_calls if ends_with_call and not self.trajectory.environment else []

    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        if self.open_tool_calls:
            return "tool_calls"
        is_cut = self.last_call is not None and self.last_call.finish_reason == "length"
        return "length" if is_cut or self.trajectory.error else "stop"

    def usage(self) -> Usage:
        prompt, output = self.trajectory.prompt_tokens, self.trajectory.output_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=output, total_tokens=prompt + output)

    def played(self) -> Played:
        trajectory = self.trajectory
        return Played(
            trajectory_id=trajectory.id,
            episode_id=trajectory.episode_id,
            policy=f"v{trajectory.policy}",
            stage=trajectory.stage,
            reward=self.reward,
            success=self.is_success,
            num_steps=trajectory.num_steps,
            num_turns=sum(step.kind is StepKind.MODEL for step in self.steps),
            prompt_tokens=trajectory.prompt_tokens,
            output_tokens=trajectory.output_tokens,
            num_invalid_tool_calls=trajectory.num_invalid_tool_calls,
            error=trajectory.error,
        )

    def tool_calls(self) -> list[ToolCall] | None:
        calls = [ToolCall.model_validate(call) for call in self.open_tool_calls]
        return calls or None

    def completion(self) -> ChatCompletion:
        """Return the whole answer at once."""
        content = self.trajectory.answer
        message = Answer(content=content, tool_calls=self.tool_calls())
        return ChatCompletion(
            id=self.trajectory.id,
            created=int(time.time()),
            model=pin(self.trajectory.policy),
            choices=[Choice(message=message, finish_reason=self.finish_reason)],
            usage=self.usage(),
            ratchet=self.played(),
        )


def chunk(trajectory: Trajectory, delta: Mapping[str, Any] | None, *, finish: str | None = None, **extra: Any) -> str:
    """Return one server-sent event of a streamed answer; a `delta` of None makes a chunk without choices."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
    body = {
        "id": trajectory.id,
        "object": "chat.completion.chunk",
        "created": int(trajectory.opened_at.timestamp()),
        "model": pin(trajectory.policy),
        "choices": choices,
        **extra,
    }
    return event(body)


def event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"
