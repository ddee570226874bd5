"""Hand-made episodes, with the token ids that an engine would have captured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from memory.conversation import restore_messages, show_memory, show_plan
from memory.schema import Split, Step, StepKind, Trajectory, TrajectoryStage, new_id
from memory.team import Role
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
"""(command, the tool's result)"""


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


def live_team(
    *,
    tokenizer: Any,
    plan: str = "Take it, then cook it.",
    command: str = "take carrot",
    answers: Sequence[str] = ("It is done.",),
    checks: Sequence[str] = ("ACCEPT",),
    is_success: bool = True,
    memory_text: str = "",
    task: str = "1",
    reward: float | None = None,
) -> GradedTrajectory:
    """Return the record of a team's episode with token ids: a plan, one move, then alternate answers and checks."""
    played = live([], task=task, is_success=is_success, memory_text=memory_text)
    trajectory, steps = played.trajectory, played.steps

    def add(messages: list[dict[str, Any]], role: Role, text: str, **fields: Any) -> None:
        said = tokenizer(f"{text or say(command)}<|im_end|>", add_special_tokens=False)["input_ids"]
        tokens = {"prompt_token_ids": render_prompt(tokenizer, messages, [ACT] if role is Role.ACTOR else [])}
        tokens["output_token_ids"] = said
        finish = "tool_calls" if not text else "stop"
        steps.append(
            _step(trajectory, steps, StepKind.MODEL, content=text, role=role, finish_reason=finish, **tokens, **fields)
        )

    def ask(prompt: str) -> list[dict[str, Any]]:
        done = str([message["content"] for message in [*trajectory.opening, *restore_messages(steps)]])
        return [{"role": "system", "content": prompt}, {"role": "user", "content": done}]

    messages = list(trajectory.opening)
    add(ask("Plan."), Role.PLANNER, plan)
    messages = show_memory(show_plan(trajectory.opening, plan), memory_text)
    add(messages, Role.ACTOR, "", tool_calls=[call(command)])
    steps.append(_step(trajectory, steps, StepKind.TOOL, content="Taken.", tool_name="act", tool_call_id="call_0"))
    messages += restore_messages(steps[1:])
    for number, answer in enumerate(answers):
        add(messages, Role.ACTOR, answer)
        messages.append({"role": "assistant", "content": answer})
        if number < len(checks):
            add(ask("Check."), Role.CHECKER, checks[number])
        if number < len(answers) - 1:
            steps.append(_step(trajectory, steps, StepKind.USER, content="Again.", role=Role.CHECKER))
            messages.append({"role": "user", "content": "Again."})
    value = played.reward if reward is None else reward
    return GradedTrajectory(trajectory, steps, value, is_success)


def _step(trajectory: Trajectory, steps: list[Step], kind: StepKind, **fields: Any) -> Step:
    return Step(trajectory_id=trajectory.id, position=len(steps), kind=kind, **fields)


def capture(tokenizer: Any, messages: list[dict[str, Any]], command: str) -> dict[str, list[int]]:
    """Return the token ids that an engine captures of one call, the end-of-turn token included."""
    said = say(command) + "<|im_end|>"
    return {
        "prompt_token_ids": render_prompt(tokenizer, messages, [ACT]),
        "output_token_ids": tokenizer(said, add_special_tokens=False)["input_ids"],
    }


def say(command: str) -> str:
    """Return the text of a model that calls `act`, as the chat template writes it."""
    return '<tool_call>\n{"name": "act", "arguments": ' + json.dumps({"command": command}) + "}\n</tool_call>"
