"""xLAM's function-calling form: a query, the calls that answer it, and tools with flat parameters in Python's types."""

from __future__ import annotations

import json
import re
from typing import Any

from memory.formats.content import BadRow, ExampleContent, ExampleKind, NotExpressible, Row
from memory.formats.messages import (
    arguments_of,
    left_over,
    parse_json_text,
    read_calls,
    require_kind,
    require_text,
    split_question,
    text_of_turn,
)

TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
    "tuple": "array",
    "set": "array",
}
PYTHON_TYPES = {schema: python for python, schema in reversed(TYPES.items())}
CONTAINER = re.compile(r"(\w+)\[(.*)\]")
OPTIONAL = ", optional"


def recognise(row: Row) -> str | None:
    """Return why a row is in this form; None where it is not."""
    return "it has 'query', 'answers' and 'tools'" if all(key in row for key in ("query", "answers", "tools")) else None


def read(row: Row) -> ExampleContent:
    """Return the demonstration of a query and its calls. Raises: BadRow."""
    answers, tools = _parse(row, "answers"), _parse(row, "tools")
    calls = read_calls(answers, "answers", "call_1")
    if not calls:
        raise BadRow("'answers' has no call: a row without one teaches nothing here, remove it")
    return ExampleContent(
        ExampleKind.DEMONSTRATION,
        [{"role": "assistant", "content": "", "tool_calls": calls}],
        prompt=[{"role": "user", "content": require_text(row, "query")}],
        tools=[_read_tool(tool, f"tools[{position}]") for position, tool in enumerate(tools)],
        extra=left_over(row, "query", "answers", "tools"),
    )


def _parse(row: Row, field: str) -> list[Any]:
    value = row.get(field)
    value = parse_json_text(value, field) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise BadRow(f"{field!r} must be a list, or the JSON text of one")
    return value


def _read_tool(tool: object, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise BadRow(f"{where} has no 'name'")
    parameters = tool.get("parameters") or {}
    is_object = isinstance(parameters, dict)
    if is_object and parameters.get("type") == "object" and isinstance(parameters.get("properties"), dict):
        schema = parameters  # some files have JSON schemas already
    elif not is_object or not all(isinstance(each, dict) for each in parameters.values()):
        raise BadRow(f"{where}.parameters must be an object that describes each parameter")
    else:
        schema = {
            "type": "object",
            "properties": {name: _read_parameter(each) for name, each in parameters.items()},
            "required": [name for name, each in parameters.items() if not _is_optional(each)],
        }
    function = {"name": tool["name"], "description": tool.get("description") or "", "parameters": schema}
    return {"type": "function", "function": function}


def _is_optional(parameter: Row) -> bool:
    kind = str(parameter.get("type", ""))
    return kind.endswith("optional") or kind.startswith("Optional[")


def _read_parameter(parameter: Row) -> Row:
    kind = str(parameter.get("type", "str")).removesuffix(OPTIONAL)
    return {**{key: value for key, value in parameter.items() if key != "type"}, **_read_type(kind)}


def _read_type(kind: str) -> Row:
    """Return the JSON schema of a Python type; of one that JSON does not have, a schema that allows anything."""
    match = CONTAINER.fullmatch(kind.strip())
    outer, inner = (match[1].lower(), match[2]) if match else (kind.strip().lower(), "")
    if outer == "optional":
        return _read_type(inner)
    if outer not in TYPES:
        return {}
    schema: Row = {"type": TYPES[outer]}
    if TYPES[outer] == "array" and inner and "," not in inner:
        schema["items"] = _read_type(inner)
    return schema


def write(content: ExampleContent) -> Row:
    """Return the row of a demonstration. Raises: NotExpressible."""
    require_kind(content, ExampleKind.DEMONSTRATION)
    prompt, replies = split_question(content)
    if len(replies) != 1 or not replies[0].get("tool_calls") or replies[0]["content"]:
        raise NotExpressible("a reply that is not calls alone")
    calls = [{"name": call["function"]["name"], "arguments": arguments_of(call)} for call in replies[0]["tool_calls"]]
    return {
        "query": text_of_turn(prompt, "user"),
        "answers": json.dumps(calls, ensure_ascii=False),
        "tools": json.dumps([_write_tool(tool["function"]) for tool in content.tools], ensure_ascii=False),
        **content.extra,
    }


def _write_tool(function: Row) -> Row:
    schema = function["parameters"]
    required = schema.get("required", ())
    parameters = {name: _write_parameter(each, name in required) for name, each in schema.get("properties", {}).items()}
    return {"name": function["name"], "description": function.get("description", ""), "parameters": parameters}


def _write_parameter(schema: Row, is_required: bool) -> Row:
    kind = _write_type(schema) + ("" if is_required else OPTIONAL)
    return {**{key: value for key, value in schema.items() if key not in ("type", "items")}, "type": kind}


def _write_type(schema: Row) -> str:
    kind = schema.get("type")
    # several types, or none: xLAM writes Any
    name = PYTHON_TYPES.get(kind, "Any") if isinstance(kind, str) else "Any"
    items = schema.get("items")
    return f"List[{_write_type(items)}]" if name == "list" and items else name
