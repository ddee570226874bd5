"""Recognizes the request of a client that continues an episode after running its own tools.

A reply that calls a client's tools is stored with a digest of the whole conversation as the client has it by then. A
later request continues the episode when its messages begin with exactly that conversation. The digest is taken of a
canonical form, because clients change a reply before they send it back: arguments are parsed and dumped again, `null`
replaces an empty text, keys are added.

Invariant: a continuing request adds only tool results and user messages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memory.conversation import text_of
from memory.schema import Step, StepKind, Trajectory
from runtime.engine.client import Message, ToolCall

MAX_PARSED_VALUES = 100_000
"""Values in the arguments of all calls of a conversation; arguments beyond it are compared as text, because parsing
blocks the event loop."""


@dataclass(frozen=True)
class Resumption:
    """A client's return to an open trajectory. `OpenEpisodes` makes it; the agent continues from it."""

    trajectory: Trajectory
    steps: Sequence[Step]
    """All steps so far."""
    tail: Sequence[Message]
    """The messages of the request after the last reply."""

    @property
    def new_messages(self) -> Sequence[Message]:
        """The messages of `tail` that are not recorded yet; a crash may have cut off an earlier attempt."""
        return self.tail[len(self._recorded_tail) :]

    @property
    def is_sound(self) -> bool:
        """Whether the messages that an earlier attempt recorded equal the ones of this request."""
        return len(self._recorded_tail) <= len(self.tail) and all(
            (step.tool_call_id, step.content) == (message.get("tool_call_id"), text_of(message))
            for step, message in zip(self._recorded_tail, self.tail, strict=False)
        )

    @property
    def _recorded_tail(self) -> list[Step]:
        """The steps since the handover, without results of the server's own tools."""
        handover = last_handover(self.steps)
        after = [] if handover is None else [step for step in self.steps if step.position > handover.position]
        ids = {message.get("tool_call_id") for message in self.tail}
        return [step for step in after if step.kind is StepKind.USER or step.tool_call_id in ids]


def split_at_answer(messages: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]] | None:
    """Return the messages up to the last reply and those after it; None if they cannot continue an episode."""
    replies = [position for position, message in enumerate(messages) if message.get("role") == "assistant"]
    if not replies or not messages[replies[-1]].get("tool_calls"):
        return None
    head, tail = messages[: replies[-1] + 1], messages[replies[-1] + 1 :]
    if not tail or any(message.get("role") not in ("tool", "user") for message in tail):
        return None
    return head, tail


def digest(messages: Sequence[Message]) -> str:
    """Return a SHA-256 hex digest that is equal for all equivalent forms of one conversation."""
    # Stored digests outlive the process: a change of the canonical form loses every episode that waits for its client.
    canonical, num_values = [], 0
    for message in messages:
        num_values += sum(_count_values(call["function"].get("arguments")) for call in message.get("tool_calls") or ())
        canonical.append(_canonical(message, is_parsed=num_values <= MAX_PARSED_VALUES))
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def last_handover(steps: Sequence[Step]) -> Step | None:
    """Return the last reply if it waits for results of the client's tools."""
    reply = next((step for step in reversed(steps) if step.kind is StepKind.MODEL), None)
    return reply if reply is not None and reply.handover_digest is not None else None


def exchanges_of(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return (user's text, what identifies the reply) for every reply in a conversation."""
    exchanges: list[tuple[str, str]] = []
    question = ""
    for message in messages:
        if message.get("role") == "user":
            question = text_of(message)
        elif message.get("role") == "assistant" and (
            reply := identify_reply(text_of(message), message.get("tool_calls") or ())
        ):
            exchanges.append((question, reply))
    return exchanges


def identify_reply(text: str, calls: Sequence[ToolCall]) -> str:
    """Return by what a reply is recognized among others: its text, and the ids of the calls that the client runs."""
    return "".join([text, *(call.get("id") or "" for call in calls)])


def _canonical(message: Message, *, is_parsed: bool) -> dict[str, Any]:
    role = message.get("role")
    # As `Message.plain` (runtime/api/openai/chat_request.py) and `as_messages` (responses_request.py) map the roles.
    canonical = {"role": "system" if role == "developer" else role, "content": text_of(message)}
    if role == "tool":
        canonical["tool_call_id"] = message.get("tool_call_id")
    if message.get("tool_calls"):
        canonical["tool_calls"] = [
            [call.get("id"), call["function"].get("name"), _value(call["function"].get("arguments"), is_parsed)]
            for call in message["tool_calls"]
        ]
    return canonical


def _count_values(arguments: object) -> int:
    """Return an upper bound of the values in a JSON text, equal for every formatting of it."""
    return sum(map(arguments.count, ",[{")) if isinstance(arguments, str) else 0


def _value(arguments: object, is_parsed: bool) -> object:
    if not is_parsed:
        return arguments
    try:
        # A limit: JavaScript writes 1.0 as 1, which is another digest; such a request begins a new trajectory.
        return json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (json.JSONDecodeError, RecursionError):
        return arguments
