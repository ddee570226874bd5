"""Corrects vLLM 0.32's grammars of tool calls; vLLM's API server loads it by `--tool-parser-plugin`.

1. vLLM holds the arguments of a forced call to the tool's schema only if the tool says `strict`. Otherwise any JSON
   value passes, and small models return `"weather"` or `false`. The grammar is corrected rather than the request,
   because `strict` is part of the prompt that the model reads.
2. `disable_any_whitespace` does not reach these grammars (vllm/v1/structured_output/backend_xgrammar.py), so that small
   models write newlines between two fields until the length limit.
3. If the length limit cuts the last of several forced calls, vLLM's hermes parser returns all of them as text; here the
   complete ones are returned as calls.

Calls that the model makes by its own choice stay unconstrained unless the client sets `strict`: a policy that cannot
make mistakes cannot learn from them. Delete this module when the pinned vLLM does all three; tests/runtime/engine/
test_forced_calls.py and the tests marked `engine` show it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

from pydantic import BaseModel
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from xgrammar.structural_tag import JSONSchemaFormat

from runtime.engine.forced_calls import as_object_schema, is_forced

if TYPE_CHECKING:
    from vllm.entrypoints.generate.base.protocol import ExtractedToolCallInformation
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
    from xgrammar import StructuralTag

MAX_WHITESPACE = 1


def constrain(get_structural_tag: Callable[..., StructuralTag | None]) -> Callable[..., StructuralTag | None]:
    """Wrap the method of a parser that makes its grammar."""

    @wraps(get_structural_tag)
    def get_constrained_tag(
        self: ToolParser,
        request: ChatCompletionRequest,
        *,
        reasoning: bool = False,
        strict_level: ToolStrictLevel = ToolStrictLevel.AUTO,
    ) -> StructuralTag | None:
        forced = is_forced(request.tool_choice)
        level = ToolStrictLevel.PARAMETER if forced else strict_level
        tag = get_structural_tag(self, request, reasoning=reasoning, strict_level=level)
        if tag is not None:
            _bound(tag.format, forced)  # in place, before vLLM compiles it
        return tag

    return get_constrained_tag


def _bound(node: object, forced: bool) -> None:
    """Limit the white space in every schema of a grammar; for a forced call, require an object."""
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


def keep_finished_calls(
    extract_tool_calls: Callable[..., ExtractedToolCallInformation],
) -> Callable[..., ExtractedToolCallInformation]:
    """Wrap the hermes parser's method that reads a whole answer."""

    @wraps(extract_tool_calls)
    def extract_finished_calls(
        self: Hermes2ProToolParser, model_output: str, request: ChatCompletionRequest
    ) -> ExtractedToolCallInformation:
        parsed = extract_tool_calls(self, model_output, request)
        finished, end, _ = model_output.rpartition(self.tool_call_end_token)
        if parsed.tools_called or not end or not is_forced(request.tool_choice):
            return parsed
        without_the_last = extract_tool_calls(self, finished + end, request)
        return without_the_last if without_the_last.tools_called else parsed

    return extract_finished_calls


# Once only: a second import would wrap the wrapper.
if not hasattr(ToolParser.get_structural_tag, "__wrapped__"):
    ToolParser.get_structural_tag = constrain(ToolParser.get_structural_tag)
Hermes = ToolParserManager.get_tool_parser("hermes")
if not hasattr(Hermes.extract_tool_calls, "__wrapped__"):
    Hermes.extract_tool_calls = keep_finished_calls(Hermes.extract_tool_calls)
