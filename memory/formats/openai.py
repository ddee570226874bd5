"""OpenAI's fine-tuning forms: `messages` with `tools`, and `input` with a preferred and a non-preferred output."""

from __future__ import annotations

from memory.formats.content import BadRow, ExampleContent, ExampleKind, Message, NotExpressible, Row
from memory.formats.messages import left_over, read_messages, read_replies, read_tools, require_kind, require_trained

PAIR_FIELDS = ("input", "preferred_output", "non_preferred_output")
OTHER_FIELDS = frozenset({"label", "prompt", "completion", "chosen", "rejected", "conversations", "traj"})
"""With one of these, the row is of another form."""


def recognise(row: Row) -> str | None:
    """Return why a row is in one of these forms; None where it is not."""
    if all(field in row for field in PAIR_FIELDS):
        return "it has 'input', 'preferred_output' and 'non_preferred_output'"
    if isinstance(row.get("messages"), list) and not OTHER_FIELDS & row.keys() and not has_object_arguments(row):
        return "it has 'messages'"
    return None


def has_object_arguments(row: Row) -> bool:
    """Return whether a call of a conversation has an object as its arguments, not the text of one."""
    for message in row["messages"]:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
                return True
    return False


def read(row: Row) -> ExampleContent:
    """Return the example of a row. Raises: BadRow."""
    if "input" in row:
        return _read_pair(row)
    return read_conversation(row)


def read_conversation(row: Row) -> ExampleContent:
    """Return the demonstration in `messages`. Raises: BadRow."""
    messages = read_messages(row.get("messages"), "messages")
    require_trained(messages, "messages")
    # `functions` is what `tools` was called before
    tools = read_tools(row.get("tools", row.get("functions")))
    return ExampleContent(
        ExampleKind.DEMONSTRATION, messages, tools=tools, extra=left_over(row, "messages", "tools", "functions")
    )


def _read_pair(row: Row) -> ExampleContent:
    source = row["input"]
    if not isinstance(source, dict):
        raise BadRow("'input' must be an object with 'messages'")
    return ExampleContent(
        ExampleKind.PREFERENCE,
        read_replies(row.get("preferred_output"), "preferred_output"),
        prompt=read_messages(source.get("messages"), "input.messages"),
        rejected=read_replies(row.get("non_preferred_output"), "non_preferred_output"),
        tools=read_tools(source.get("tools"), "input.tools"),
        extra=left_over(row, *PAIR_FIELDS),
    )


def write(content: ExampleContent) -> Row:
    """Return the row of an example. Raises: NotExpressible."""
    require_kind(content, ExampleKind.DEMONSTRATION, ExampleKind.PREFERENCE)
    tools = {"tools": content.tools} if content.tools else {}
    if content.kind is ExampleKind.DEMONSTRATION:
        return {"messages": content.messages, **tools, **content.extra}
    return {
        "input": {"messages": content.prompt, **tools},
        "preferred_output": _single(content.completion),
        "non_preferred_output": _single(content.rejected),
        **content.extra,
    }


def _single(completion: list[Message]) -> list[Message]:
    if len(completion) != 1:
        raise NotExpressible("an output of several messages")
    return completion
