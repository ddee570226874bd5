"""Forced tool calls and the schema that their arguments satisfy.

The engine that this project starts enforces the schema in its grammars (tool_call_grammar.py). An external engine is
asked for it by `strict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A schema without any of these keys allows every type of value.
TYPE_KEYS = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"})


def is_forced(tool_choice: object) -> bool:
    """Return whether the model has to call a tool."""
    return tool_choice not in (None, "auto", "none")


def as_object_schema(schema: object) -> dict[str, Any]:
    """Return the schema of arguments such that only an object satisfies it; no schema becomes the empty object's."""
    if not isinstance(schema, dict):
        return {"type": "object", "properties": {}}
    return schema if TYPE_KEYS & schema.keys() else {"type": "object", **schema}


def ask_for_schemas(tools: Sequence[dict[str, Any]], tool_choice: object) -> list[dict[str, Any]]:
    """Return the tools for an external engine; strict and each with a schema if a call is forced."""
    if not is_forced(tool_choice):
        return list(tools)
    return [{**tool, "function": _as_strict(tool["function"])} for tool in tools]


def _as_strict(function: dict[str, Any]) -> dict[str, Any]:
    # `strict` is part of the prompt that the model reads: our own engine does without (tool_call_grammar.py).
    return {**function, "parameters": as_object_schema(function.get("parameters")), "strict": True}
