"""Builds the messages of a model call, for the runtime and for training data.

Hazard: the token ids of training rows depend on the form. A second implementation would drift unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from memory.chat_marks import neutralise
from memory.schema import StepKind
from memory.team import Role, is_actors

Message = dict[str, Any]


def show_memory(opening: Sequence[Message], memory_text: str) -> list[Message]:
    """Return the opening with the memory segment ahead of its last user message."""
    return _add_to_last_user(opening, before=f"{memory_text}\n\n") if memory_text else list(opening)


def show_plan(opening: Sequence[Message], plan: str) -> list[Message]:
    """Return the opening with a plan behind the text of its last user message.

    Behind it, because the memory segment goes ahead of it: the two leave each other's tokens as they are.
    """
    shown = f"\n\nA plan, which may be wrong:\n{neutralise(plan.strip())}"
    return _add_to_last_user(opening, behind=shown) if plan.strip() else list(opening)


def _add_to_last_user(opening: Sequence[Message], *, before: str = "", behind: str = "") -> list[Message]:
    messages = list(opening)
    position = next((at for at in reversed(range(len(messages))) if messages[at].get("role") == "user"), None)
    if position is None:
        return messages
    content = messages[position].get("content") or ""
    if isinstance(content, str):
        shown: str | list[dict[str, Any]] = f"{before}{content}{behind}"
    else:  # OpenAI's list of parts
        # vLLM joins parts with a newline for templates that take none, so the two forms differ by one newline
        # (optimizer/data/stitching.py tries both)
        ahead, after = ([{"type": "text", "text": text}] if text else [] for text in (before, behind))
        shown = [*ahead, *content, *after]
    messages[position] = messages[position] | {"content": shown}
    return messages


def text_of(message: Message) -> str:
    """Return the text of a message whose content is a string or a list of parts."""
    # digests of open episodes are taken of it (runtime/agent/resume.py): joined otherwise, none of them would resume
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def last_user_text(messages: Sequence[Message]) -> str:
    """Return the text of the last user message; empty without one."""
    return next((text_of(message) for message in reversed(messages) if message.get("role") == "user"), "")


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
