"""Builds the messages that the model was shown, the same way for the runtime and for training data.

The token ids of a row depend on this form: a second implementation would drift from the first unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        shown = [{"type": "text", "text": f"{memory_text}\n\n"}, *content]
    messages[positions[-1]] = messages[positions[-1]] | {"content": shown}
    return messages


def as_reply(content: str, tool_calls: Sequence[dict[str, Any]]) -> Message:
    """Return a model's reply as later prompts show it.

    vLLM's hermes parser leaves the newline between a thought and its call in the content, and the templates of Qwen
    write one of their own: with both, no later prompt would begin with the tokens that were sampled, which costs the
    prefix cache, and a training row for every call.
    """
    if not tool_calls:
        return {"role": "assistant", "content": content}
    return {"role": "assistant", "content": content.removesuffix("\n"), "tool_calls": list(tool_calls)}
