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
