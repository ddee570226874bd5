"""Which calls are forced, and the schema that the arguments of a forced call satisfy.

The engine that this project starts enforces it in its grammars (engine_tool_calls.py). An engine elsewhere is asked
to, by `strict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A schema with none of these says nothing about the kind of value.
SAYS_THE_KIND = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"})


def is_forced(tool_choice: Any) -> bool:
    """Return whether the model must call a tool."""
    return tool_choice not in (None, "auto", "none")


def as_object_schema(schema: Any) -> dict[str, Any]:
    """Return a schema of arguments that only an object satisfies; none at all becomes the empty object."""
    if not isinstance(schema, dict):
        return {"type": "object", "properties": {}}
    return schema if SAYS_THE_KIND & schema.keys() else {"type": "object", **schema}


def ask_for_schemas(tools: Sequence[dict[str, Any]], tool_choice: Any) -> list[dict[str, Any]]:
    """Return the tools as an engine elsewhere must get them for a forced call: strict, with a schema each."""
    if not is_forced(tool_choice):
        return list(tools)
    return [{**tool, "function": _as_strict(tool["function"])} for tool in tools]


def _as_strict(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "parameters": as_object_schema(function.get("parameters")), "strict": True}
