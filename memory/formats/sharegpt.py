"""ShareGPT's form, `conversations` of {from, value}, as AgentInstruct, AgentBank, ETO and LLaMA-Factory write it.

`function_call` and `observation` turns are a call and its result. A ReAct text (Thought, Action, Observation) stays
text. `loss: false` on a turn keeps it out of the loss.
"""

from __future__ import annotations

import json
from typing import Any

from memory.formats.content import BadRow, ExampleContent, ExampleKind, Message, NotExpressible, Row
from memory.formats.messages import arguments_of, left_over, parse_json_text, read_messages, read_tools, require_trained

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
NAMES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
FIELDS = ("conversations", "system", "tools", "chosen", "rejected", "kto_tag", "label", "prompt")


def recognise(row: Row) -> str | None:
    """Return why a row is in this form; None where it is not."""
    for field in ("conversations", "prompt"):  # ETO's pairs call the conversation `prompt`
        turns = row.get(field)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
            return f"it has {field!r} of 'from' and 'value'"
    return None


def read(row: Row) -> ExampleContent:
    """Return the example of a row: a preference with `chosen` and `rejected`, a label with `kto_tag` or `label`.

    Raises: BadRow.
    """
    field = "conversations" if "conversations" in row else "prompt"
    turns = row.get(field)
    system = row.get("system")
    if isinstance(system, str) and system:
        turns = [{"from": "system", "value": system}, *turns] if isinstance(turns, list) else turns
    messages = _read_turns(turns, field)
    rest: dict[str, Any] = {"tools": read_tools(row.get("tools")), "extra": left_over(row, *FIELDS)}
    if "chosen" in row or "rejected" in row:
        chosen, rejected = (_read_completion(row.get(field), field) for field in ("chosen", "rejected"))
        return ExampleContent(ExampleKind.PREFERENCE, chosen, prompt=messages, rejected=rejected, **rest)
    require_trained(messages, field)
    label = row.get("kto_tag", row.get("label"))
    if label is None:
        return ExampleContent(ExampleKind.DEMONSTRATION, messages, **rest)
    if label not in (True, False):
        raise BadRow(f"'kto_tag' is {label!r}: use true for a good reply and false for a bad one")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise BadRow(f"{field!r} must end with the reply that 'kto_tag' speaks of, behind a prompt")
    return ExampleContent(ExampleKind.LABEL, messages[-1:], prompt=messages[:-1], is_good=bool(label), **rest)


def _read_completion(value: object, field: str) -> list[Message]:
    messages = _read_turns([value] if isinstance(value, dict) else value, field)
    require_trained(messages, field)
    return messages


def _read_turns(value: object, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{field!r} must be a list of turns with at least one")
    messages: list[Row] = []
    for position, turn in enumerate(value):
        where = f"{field}[{position}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRow(f"{where} must be an object with 'from' and a text 'value'")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise BadRow(f"{where}.from is {speaker!r}: use one of {', '.join(ROLES)}")
        message: Row = {"role": ROLES[speaker], "content": turn["value"]}
        if speaker == "function_call":
            message |= {"content": "", "tool_calls": _read_calls(turn["value"], where)}
            # a thought before its call is the same reply
            if messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
                message = {**messages.pop(), "tool_calls": message["tool_calls"]}
        if turn.get("loss") is False and message["role"] == "assistant":
            message["weight"] = 0
        messages.append(message)
    return read_messages(messages, field)


def _read_calls(value: str, where: str) -> list[Any]:
    calls = parse_json_text(value, f"{where}.value")
    return calls if isinstance(calls, list) else [calls]


def write(content: ExampleContent) -> Row:
    """Return the row of an example. Raises: NotExpressible."""
    extra = dict(content.extra)
    tools = [tool["function"] for tool in content.tools]
    rest = {"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}
    match content.kind:
        case ExampleKind.DEMONSTRATION:
            return {"conversations": _write_turns(content.messages), **rest, **extra}
        case ExampleKind.LABEL:
            if len(content.completion) > 1:  # the mark speaks of the last reply alone
                raise NotExpressible("a label of several messages")
            turns = _write_turns([*content.prompt, *content.completion])
            return {"conversations": turns, "kto_tag": content.is_good, **rest, **extra}
        case ExampleKind.PREFERENCE:
            sides = {"chosen": _write_turns(content.completion), "rejected": _write_turns(content.rejected)}
            # one turn as an object: LLaMA-Factory takes no list
            sides = {name: turns[0] if len(turns) == 1 else turns for name, turns in sides.items()}
            return {"conversations": _write_turns(content.prompt), **sides, **rest, **extra}


def _write_turns(messages: list[Message]) -> list[Row]:
    _require_results_in_order(messages)
    turns: list[Row] = []
    for message in messages:
        written: list[Row] = []
        if message["content"] or not message.get("tool_calls"):
            written.append({"from": NAMES[message["role"]], "value": message["content"]})
        if message.get("tool_calls"):
            calls = [
                {"name": call["function"]["name"], "arguments": arguments_of(call)} for call in message["tool_calls"]
            ]
            value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
            written.append({"from": "function_call", "value": value})
        if message.get("weight") == 0:
            written = [{**turn, "loss": False} for turn in written]
        turns += written
    return turns


def _require_results_in_order(messages: list[Message]) -> None:
    """Raise NotExpressible unless results follow in the order of their calls: an observation does not name its call."""
    waiting: list[str] = []
    for message in messages:
        if message.get("tool_calls"):
            waiting = [call["id"] for call in message["tool_calls"]]
        elif message["role"] == "tool" and (not waiting or waiting.pop(0) != message["tool_call_id"]):
            raise NotExpressible("results in another order than their calls")
