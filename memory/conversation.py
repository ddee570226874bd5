"""Builds the messages of a model call, for the runtime and for training data.

Hazard: the token ids of training rows depend on the form. A second implementation would drift unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from memory.schema import StepKind
from memory.team import Role, is_actors

Message = dict[str, Any]


def show_memory(opening: Sequence[Message], memory_text: str) -> list[Message]:
    """Return the opening with the memory segment ahead of its last user message."""
    messages = list(opening)
    positions = [position for position, message in enumerate(messages) if message.get("role") == "user"]
    if not memory_text or not positions:
        return messages
    content = messages[positions[-1]].get("content") or ""
    if isinstance(content, str):
        shown: str | list[dict[str, Any]] = f"{memory_text}\n\n{content}"
    else:  # OpenAI's list of parts
        # vLLM joins parts with a newline for templates that take none, so the two forms differ by one newline
        # (optimizer/data/stitching.py tries both)
        shown = [{"type": "text", "text": f"{memory_text}\n\n"}, *content]
    messages[positions[-1]] = messages[positions[-1]] | {"content": shown}
    return messages


def as_reply(content: str, tool_calls: Sequence[dict[str, Any]]) -> Message:
    """Return a model's reply in the form of later prompts.

    vLLM's hermes parser leaves the newline between a thought and its tool call in the content, and Qwen's templates
    write one themselves. With both, later prompts would not begin with the sampled tokens: the prefix cache would miss,
    and every call would become a training row of its own.
    """
    if not tool_calls:
        return {"role": "assistant", "content": content}
    return {"role": "assistant", "content": content.removesuffix("\n"), "tool_calls": list(tool_calls)}


class RecordedStep(Protocol):
    """The parts of a step that messages are restored from: of a `Step`, or of a row of these columns."""

    @property
    def kind(self) -> StepKind: ...

    @property
    def content(self) -> str: ...

    @property
    def tool_calls(self) -> list[dict[str, Any]]: ...

    @property
    def tool_call_id(self) -> str | None: ...

    @property
    def role(self) -> Role | None: ...


def restore_messages(steps: Sequence[RecordedStep]) -> list[Message]:
    """Return the steps as the messages that the model was shown; of a team's, those that the actor was shown."""
    return [_as_message(step) for step in steps if is_actors(step)]


def _as_message(step: RecordedStep) -> Message:
    if step.kind is StepKind.USER:
        return {"role": "user", "content": step.content}
    if step.kind is StepKind.TOOL:
        return {"role": "tool", "tool_call_id": step.tool_call_id, "content": step.content}
    return as_reply(step.content, step.tool_calls)
