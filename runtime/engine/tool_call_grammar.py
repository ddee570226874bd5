"""A correction to vLLM 0.32's grammars of tool calls, loaded into its API server by `--tool-parser-plugin`.

A forced call satisfies its schema. vLLM holds the arguments of a forced call to the tool's schema only where the tool
says `strict`; for all others any JSON value passes, and small models return `"weather"` or `false`. The correction is
made in the grammar and not in the request, because `strict` is part of the prompt that the model reads.

A call comes to its end. `disable_any_whitespace` does not reach these grammars (vllm/v1/structured_output/
backend_xgrammar.py), and small models then write newlines between two fields until the length limit.

The answer's length may cut the last of several calls. vLLM's hermes parser then returns all of them as a text; of a
forced call, those that came to their end are returned as calls.

Calls that a model makes of its own accord keep their freedom, unless the client asks for `strict`: a policy must be
able to make its own mistakes, or it cannot learn from them. Remove this when the pinned version does both.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from pydantic import BaseModel
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from xgrammar.structural_tag import JSONSchemaFormat

from runtime.engine.forced_calls import as_object_schema, is_forced

MAX_WHITESPACE = 1


def constrain(get_structural_tag):
    """Wrap a parser's making of the grammar."""

    @wraps(get_structural_tag)
    def get_constrained_tag(self, request, *, reasoning=False, strict_level=ToolStrictLevel.AUTO):
        forced = is_forced(request.tool_choice)
        level = ToolStrictLevel.PARAMETER if forced else strict_level
        tag = get_structural_tag(self, request, reasoning=reasoning, strict_level=level)
        if tag is not None:
            _bound(tag.format, forced)
        return tag

    return get_constrained_tag


def _bound(node: Any, forced: bool) -> None:
    """Limit the white space in every schema of a grammar; where the call is forced, demand an object."""
    if isinstance(node, JSONSchemaFormat):
        node.max_whitespace_cnt = MAX_WHITESPACE
        if forced:
            node.json_schema = as_object_schema(node.json_schema)
    elif isinstance(node, BaseModel):
        for name in type(node).model_fields:
            _bound(getattr(node, name), forced)
    elif isinstance(node, list | tuple):
        for item in node:
            _bound(item, forced)


def keep_finished_calls(extract_tool_calls):
    """Wrap the hermes parser's reading of a whole answer."""

    @wraps(extract_tool_calls)
    def extract_finished_calls(self, model_output, request):
        found = extract_tool_calls(self, model_output, request)
        finished, end, _ = model_output.rpartition(self.tool_call_end_token)
        if found.tools_called or not end or not is_forced(request.tool_choice):
            return found
        without_the_last = extract_tool_calls(self, finished + end, request)
        return without_the_last if without_the_last.tools_called else found

    return extract_finished_calls


if not hasattr(ToolParser.get_structural_tag, "__wrapped__"):
    ToolParser.get_structural_tag = constrain(ToolParser.get_structural_tag)
Hermes = ToolParserManager.get_tool_parser("hermes")
if not hasattr(Hermes.extract_tool_calls, "__wrapped__"):
    Hermes.extract_tool_calls = keep_finished_calls(Hermes.extract_tool_calls)
