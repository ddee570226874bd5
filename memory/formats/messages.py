"""Checks messages and tool definitions, and brings them into OpenAI's form.

Arguments of calls are JSON texts, contents are texts, every call has an id, and every tool message names its call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from memory.formats.content import BadRow, ExampleContent, ExampleKind, Message, NotExpressible, Row, is_trained

ROLES = ("system", "developer", "user", "assistant", "tool")
KNOWN_KEYS = frozenset(
    {"role", "content", "tool_calls", "tool_call_id", "name", "weight", "function_call", "reasoning_content"}
)


def read_messages(value: object, field: str) -> list[Message]:
    """Return the messages of a field. Raises: BadRow."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{field!r} must be a list of messages with at least one, not {_shorten(value)}")
    messages: list[Message] = []
    waiting: list[str] = []
    for position, message in enumerate(value):
        where = f"{field}[{position}]"
        if not isinstance(message, dict):
            raise BadRow(f"{where} must be an object with 'role' and 'content', not {_shorten(message)}")
        messages.append(_read_message(message, where, f"call_{len(messages)}", waiting))
    return messages


def read_turns(value: object, field: str) -> list[Message]:
    """Return a text as a user's message, or messages as they are. Raises: BadRow."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else read_messages(value, field)


def read_replies(value: object, field: str) -> list[Message]:
    """Return a text as an assistant's message, or messages of which one is trained. Raises: BadRow."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    elif isinstance(value, dict):
        value = [value]
    messages = read_messages(value, field)
    require_trained(messages, field)
    return messages


def require_trained(messages: Sequence[Message], field: str) -> None:
    """Raise BadRow unless at least one reply has something to train."""
    if not any(is_trained(each) and (each["content"] or each.get("tool_calls")) for each in messages):
        raise BadRow(f"{field!r} has no assistant message to learn from: add one with content or tool_calls")


def _read_message(message: Row, where: str, call_prefix: str, waiting: list[str]) -> Message:
    """Return one message; `waiting` holds the ids of the calls that have no result yet."""
    unknown = sorted(key for key, value in message.items() if key not in KNOWN_KEYS and value not in (None, "", [], {}))
    if unknown:
        raise BadRow(f"{where} has the unknown field {unknown[0]!r}: remove it")
    role = "tool" if message.get("role") == "function" else message.get("role")
    if role not in ROLES:
        raise BadRow(f"{where}.role is {role!r}: use one of {', '.join(ROLES)}")
    read: Message = {"role": role, "content": read_text(message.get("content"), f"{where}.content")}
    if isinstance(message.get("reasoning_content"), str):
        read["reasoning_content"] = message["reasoning_content"]
    if isinstance(message.get("name"), str) and message["name"]:
        read["name"] = message["name"]
    if role == "assistant":
        _read_reply(message, read, where, call_prefix, waiting)
    elif message.get("tool_calls") or message.get("function_call"):
        raise BadRow(f"{where} is a message of {role!r} with tool calls: only an assistant calls tools")
    if role == "tool":
        read["tool_call_id"] = _match_call(message.get("tool_call_id"), where, waiting)
    return read


def _read_reply(message: Row, read: Message, where: str, call_prefix: str, waiting: list[str]) -> None:
    weight = message.get("weight")
    # bool is an int: JSON's true is not a weight
    if weight not in (None, 0, 1) or isinstance(weight, bool):
        raise BadRow(f"{where}.weight is {weight!r}: it is 0 or 1")
    if weight == 0:
        read["weight"] = 0
    legacy = message.get("function_call")
    calls = message.get("tool_calls") or ([{"function": legacy}] if legacy else [])
    if calls:
        read["tool_calls"] = read_calls(calls, f"{where}.tool_calls", call_prefix)
        waiting[:] = [call["id"] for call in read["tool_calls"]]


def read_calls(value: object, where: str, call_prefix: str) -> list[dict[str, Any]]:
    """Return tool calls in OpenAI's form; one without an id gets one. Raises: BadRow."""
    if not isinstance(value, list):
        raise BadRow(f"{where} must be a list of calls, not {_shorten(value)}")
    calls = []
    for number, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise BadRow(f"{where}[{number}] has no function name: give it as {{'function': {{'name': ...}}}}")
        call_id = call.get("id") if isinstance(call.get("id"), str) and call.get("id") else f"{call_prefix}_{number}"
        arguments = _read_arguments(function.get("arguments", function.get("parameters")), f"{where}[{number}]")
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _read_arguments(value: object, where: str) -> str:
    """Return the arguments of a call as a JSON text, unchanged where they are one."""
    if value is None or value == "":
        return "{}"
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise BadRow(f"the arguments of {where} are no JSON: {_shorten(value)}") from None
    if not isinstance(parsed, dict):
        raise BadRow(f"the arguments of {where} must be a JSON object, not {_shorten(parsed)}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _match_call(call_id: object, where: str, waiting: list[str]) -> str:
    """Return the id of the call that a tool message answers, and take it off those that wait."""
    if not waiting:
        raise BadRow(f"{where} is the result of no call: an assistant message with tool_calls must come before it")
    if isinstance(call_id, str) and call_id:
        if call_id not in waiting:
            raise BadRow(f"{where}.tool_call_id is {call_id!r}, and no call before it has that id and no result yet")
        waiting.remove(call_id)
        return call_id
    return waiting.pop(0)


def read_text(value: object, where: str) -> str:
    """Return a content as text: OpenAI's text parts are joined as vLLM does. Raises: BadRow."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(parts):
        raise BadRow(f"{where} must be text, or a list of text parts, not {_shorten(value)}: images are not learned")
    return "\n".join(texts)


def read_tools(value: object, field: str = "tools") -> list[dict[str, Any]]:
    """Return tool definitions in OpenAI's form, from a list or the JSON text of one. Raises: BadRow."""
    tools = parse_json_text(value, field) if isinstance(value, str) else value
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise BadRow(f"{field!r} must be a list of tool definitions, not {_shorten(tools)}")
    return [_read_tool(tool, f"{field}[{position}]") for position, tool in enumerate(tools)]


def _read_tool(tool: object, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"{where} has no name: give it as {{'type': 'function', 'function': {{'name': ...}}}}")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise BadRow(f"{where}.parameters must be a JSON schema, not {_shorten(parameters)}")
    kept = {key: function[key] for key in ("name", "description", "strict") if function.get(key) is not None}
    return {"type": "function", "function": {**kept, "parameters": parameters}}


def parse_json_text(value: str, field: str) -> Any:
    """Return the value of a field that holds JSON as text; None for an empty one. Raises: BadRow."""
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise BadRow(f"{field!r} is a text that is no JSON: {_shorten(value)}") from None


def as_object_arguments(messages: Iterable[Message]) -> list[Message]:
    """Return messages whose calls have objects as arguments, as chat templates and TRL take them."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "arguments": arguments_of(call)}}


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call as an object. Raises: NotExpressible where a model wrote something else."""
    try:
        arguments = json.loads(call["function"]["arguments"] or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise NotExpressible("a call whose arguments are no JSON object")
    return arguments


def text_of_turn(messages: Sequence[Message], role: str) -> str:
    """Return the text of the only message. Raises: NotExpressible for anything but one plain message of this role."""
    if len(messages) != 1 or messages[0]["role"] != role or set(messages[0]) - {"role", "content"}:
        raise NotExpressible(f"not one plain message of {role}")
    return messages[0]["content"]


def split_question(content: ExampleContent) -> tuple[list[Message], list[Message]]:
    """Return (prompt, replies) of a demonstration: one conversation is split before its first reply."""
    if content.prompt:
        return content.prompt, content.completion
    first = next(position for position, message in enumerate(content.completion) if message["role"] == "assistant")
    return content.completion[:first], content.completion[first:]


def require_kind(content: ExampleContent, *kinds: ExampleKind) -> None:
    """Raise NotExpressible unless the example is of one of these kinds."""
    if content.kind not in kinds:
        raise NotExpressible(f"a {content.kind.value}")


def require_text(row: Row, field: str) -> str:
    """Return the text of a field. Raises: BadRow when it is absent or none."""
    value = row.get(field)
    if not isinstance(value, str):
        raise BadRow(f"{field!r} must be a text, not {_shorten(value)}")
    return value


def left_over(row: Row, *fields: str) -> Row:
    """Return the fields of a row that a reader did not use."""
    return {key: value for key, value in row.items() if key not in fields}


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
