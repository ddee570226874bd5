"""How an episode is handed over to a client that runs tools itself, and how one knows that it has come back.

Refuses to know who keeps the rows, and who plays. A reply that calls a client's tools bears a digest of the whole
conversation as the client has it by then; a request belongs to the episode when it begins with just that. The digest
is of a canonical form, because clients send a reply back in other words: arguments parsed and dumped again, `null` for
an empty text, keys of their own.

Invariant: what goes on from an episode adds to it results of tools and words of the user, nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memory.conversation import as_reply
from memory.schema import Step, StepKind, Trajectory
from runtime.engine.client import Message

MAX_PARSED_VALUES = 100_000
"""In the arguments of all calls of a conversation; those beyond are compared as texts. Parsing holds up all others."""


@dataclass(frozen=True)
class Resumption:
    """A client that is back: the trajectory it left, the steps so far, and what it brings."""

    trajectory: Trajectory
    steps: Sequence[Step]
    tail: Sequence[Message]

    @property
    def news(self) -> Sequence[Message]:
        """The messages that are not recorded yet; fewer than it brought where an earlier try was cut off by a crash."""
        return self.tail[len(self._brought) :]

    @property
    def is_sound(self) -> bool:
        """Whether what an earlier try recorded of these messages is what they say now."""
        return len(self._brought) <= len(self.tail) and all(
            (step.tool_call_id, step.content) == (message.get("tool_call_id"), text_of(message))
            for step, message in zip(self._brought, self.tail, strict=False)
        )

    @property
    def _brought(self) -> list[Step]:
        """The steps since the handover that are not results of our own tools."""
        handover = last_handover(self.steps)
        after = [] if handover is None else [step for step in self.steps if step.position > handover.position]
        ids = {message.get("tool_call_id") for message in self.tail}
        return [step for step in after if step.kind is StepKind.USER or step.tool_call_id in ids]


def split_at_answer(messages: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]] | None:
    """Return what was said up to the last reply, and what came after it; None where that cannot go on from anything."""
    places = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
    if not places or not messages[places[-1]].get("tool_calls"):
        return None
    head, tail = messages[: places[-1] + 1], messages[places[-1] + 1 :]
    if not tail or any(message.get("role") not in ("tool", "user") for message in tail):
        return None
    return head, tail


def digest(messages: Sequence[Message]) -> str:
    """Return a digest that is the same for every honest rendering of the same conversation."""
    canonical, num_values = [], 0
    for message in messages:
        num_values += sum(_count_values(call["function"].get("arguments")) for call in message.get("tool_calls") or ())
        canonical.append(_canonical(message, is_parsed=num_values <= MAX_PARSED_VALUES))
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def last_handover(steps: Sequence[Step]) -> Step | None:
    """Return the reply that waits for the client's results, if the last reply does."""
    reply = next((step for step in reversed(steps) if step.kind is StepKind.MODEL), None)
    return reply if reply is not None and reply.handover_digest is not None else None


def text_of(message: Message) -> str:
    """Return what a message says, whether it is one text or several parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def exchanges_of(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return what the user said and what was replied, for every reply in a conversation."""
    exchanges, asked = [], ""
    for message in messages:
        if message.get("role") == "user":
            asked = text_of(message)
        elif message.get("role") == "assistant" and (reply := text_of(message)):
            exchanges.append((asked, reply))
    return exchanges


def restore_messages(steps: Sequence[Step]) -> list[Message]:
    """Return the steps as the messages that the model was shown."""
    return [_as_message(step) for step in steps]


def _as_message(step: Step) -> Message:
    if step.kind is StepKind.USER:
        return {"role": "user", "content": step.content}
    if step.kind is StepKind.TOOL:
        return {"role": "tool", "tool_call_id": step.tool_call_id, "content": step.content}
    return as_reply(step.content, step.tool_calls)


def _canonical(message: Message, *, is_parsed: bool) -> dict[str, Any]:
    role = message.get("role")
    canonical = {"role": "system" if role == "developer" else role, "content": text_of(message)}
    if role == "tool":
        canonical["tool_call_id"] = message.get("tool_call_id")
    if message.get("tool_calls"):
        canonical["tool_calls"] = [
            [call.get("id"), call["function"].get("name"), _value(call["function"].get("arguments"), is_parsed)]
            for call in message["tool_calls"]
        ]
    return canonical


def _count_values(arguments: Any) -> int:
    """Return how many values a text of JSON holds at most; the same for every rendering of it."""
    return sum(map(arguments.count, ",[{")) if isinstance(arguments, str) else 0


def _value(arguments: Any, is_parsed: bool) -> Any:
    if not is_parsed:
        return arguments
    try:
        return json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (json.JSONDecodeError, RecursionError):
        return arguments
