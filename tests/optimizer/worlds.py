"""Hand-made episodes, with the token ids that an engine would have captured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from memory.conversation import show_memory
from memory.schema import Split, Step, StepKind, Trajectory, TrajectoryStage, new_id
from optimizer.data.stitching import render_prompt
from optimizer.rewards import GradedTrajectory

SYSTEM = "You cook."
ACT = {
    "type": "function",
    "function": {
        "name": "act",
        "description": "Do one thing.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
Move = tuple[str, str]
"""(command, what the world says to it)"""


def call(command: str, call_id: str = "call_0") -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": "act", "arguments": json.dumps({"command": command})},
    }


def live(
    moves: Sequence[Move],
    *,
    tokenizer: Any = None,
    task: str = "1",
    text: str = "Make a meal.",
    is_success: bool = True,
    memory_text: str = "",
    split: Split = Split.PRACTICE,
    kind: str = "cooking",
    environment: str | None = "kitchen",
    num_invalid_tool_calls: int = 0,
) -> GradedTrajectory:
    """Return the record of an episode that made `moves`; with a tokenizer, its steps carry token ids."""
    opening = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    trajectory = Trajectory(
        id=new_id("trj"),
        episode_id=new_id("epi"),
        environment=environment,
        task=task,
        kind=kind,
        split=split,
        task_text=text,
        policy=0,
        stage=TrajectoryStage.FINISHED,
        opening=opening,
        tools=[ACT],
        memory_text=memory_text,
        num_invalid_tool_calls=num_invalid_tool_calls,
    )
    messages = show_memory(opening, memory_text) if memory_text else list(opening)
    steps: list[Step] = []
    for command, says in moves:
        tokens = capture(tokenizer, messages, command) if tokenizer is not None else {}
        steps.append(
            _step(trajectory, steps, StepKind.MODEL, tool_calls=[call(command)], finish_reason="tool_calls", **tokens)
        )
        steps.append(_step(trajectory, steps, StepKind.TOOL, content=says, tool_name="act", tool_call_id="call_0"))
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call(command)]},
            {"role": "tool", "content": says, "tool_call_id": "call_0"},
        ]
    trajectory.num_steps = len(steps)
    return GradedTrajectory(trajectory, steps, 1.0 if is_success else 0.0, is_success)


def _step(trajectory: Trajectory, steps: list[Step], kind: StepKind, **fields: Any) -> Step:
    return Step(trajectory_id=trajectory.id, position=len(steps), kind=kind, **fields)


def capture(tokenizer: Any, messages: list[dict[str, Any]], command: str) -> dict[str, list[int]]:
    """Return what an engine would have captured of one call, the end-of-turn token included."""
    said = say(command) + "<|im_end|>"
    return {
        "prompt_token_ids": render_prompt(tokenizer, messages, [ACT]),
        "output_token_ids": tokenizer(said, add_special_tokens=False)["input_ids"],
    }


def say(command: str) -> str:
    """Return the words of a model that calls `act`, as the chat template writes them."""
    return '<tool_call>\n{"name": "act", "arguments": ' + json.dumps({"command": command}) + "}\n</tool_call>"
