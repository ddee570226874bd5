"""Forced calls: the grammar of our engine, and the request to an engine elsewhere."""

from __future__ import annotations

import asyncio
import json
import warnings
from typing import Any

import pytest

from runtime.engine.client import EngineClient
from runtime.engine.forced_calls import as_object_schema
from tests.runtime.fake_engine import LOOK, FakeEngine, say

PING = {"type": "function", "function": {"name": "ping"}}
NAMED = {"type": "function", "function": {"name": "look"}}


@pytest.fixture(scope="module")
def parser():
    """Return vLLM's hermes parser as our engine configures it."""
    pytest.importorskip("xgrammar")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # importing vLLM imports torch.jit
        from vllm.tool_parsers import ToolParserManager

        from runtime.engine import tool_call_grammar as engine_tool_calls  # noqa: F401  (as vLLM imports it)
    from tests.runtime.tiny_models import make_tokenizer

    return ToolParserManager.get_tool_parser("hermes")(make_tokenizer())


def new_request(tool: dict[str, Any], tool_choice: Any):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(messages=[], tools=[tool], tool_choice=tool_choice)


@pytest.fixture(scope="module")
def accepts(parser):
    """Return a function that tests whether our engine's grammar of a call accepts arguments."""
    import xgrammar

    tokenizer = parser.model_tokenizer
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer)))

    def ask(tool: dict[str, Any], tool_choice: Any, arguments: str) -> bool:
        tag = parser.get_structural_tag(new_request(tool, tool_choice))
        if tag is None:
            return True
        matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(json.dumps(tag.model_dump())))
        name = tool["function"]["name"]
        return matcher.accept_string(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')

    return ask


@pytest.mark.parametrize("tool_choice", ["required", NAMED])
def test_the_arguments_of_a_forced_call_are_an_object_of_the_schema(accepts, tool_choice: Any):
    assert accepts(LOOK, tool_choice, '{"where": "here"}')
    for wrong in ('"here"', "false", "{}", '{"where": 3}', '{"place": "here"}'):
        assert not accepts(LOOK, tool_choice, wrong), wrong


def test_a_forced_call_cannot_run_into_white_space(accepts):
    assert accepts(LOOK, "required", '{ "where": "here" }')
    assert not accepts(LOOK, "required", '{\n\n"where": "here"}')
    assert not accepts(LOOK, "required", '{"where":   "here"}')


def test_a_tool_without_parameters_is_called_with_an_empty_object(accepts):
    assert accepts(PING, "required", "{}")
    for wrong in ("null", '"x"', '{"x": 1}'):
        assert not accepts(PING, "required", wrong), wrong


def test_a_call_that_nobody_forces_is_free(accepts):
    assert accepts(LOOK, "auto", "false")
    strict = {"type": "function", "function": {**LOOK["function"], "strict": True}}
    assert not accepts(strict, "auto", "false")


def test_calls_that_ended_are_kept_where_the_length_cuts_the_last_of_a_forced_turn(parser):
    call = '<tool_call>\n{"name": "look", "arguments": {"where": "here"}}\n</tool_call>'
    here, there = call, call.replace('"here"', '"there"')
    found = parser.extract_tool_calls(here + there + here[:30], new_request(LOOK, "required"))
    assert [json.loads(call.function.arguments) for call in found.tool_calls] == [{"where": "here"}, {"where": "there"}]
    assert found.tools_called and not found.content

    cut = parser.extract_tool_calls(here[:30], new_request(LOOK, "required"))
    assert not cut.tools_called and cut.content == here[:30]
    free = parser.extract_tool_calls(here + here[:30], new_request(LOOK, "auto"))
    assert not free.tools_called and free.content == here + here[:30]


def test_a_schema_that_says_its_kind_is_left_as_it_is():
    anything = {"anyOf": [{"type": "object"}]}
    assert as_object_schema(anything) == anything
    assert as_object_schema({"required": ["a"]}) == {"type": "object", "required": ["a"]}
    assert as_object_schema(None) == as_object_schema(True) == {"type": "object", "properties": {}}


async def sent_tools(tool_choice: Any, *, is_ours: bool = False) -> list[dict[str, Any]]:
    async with FakeEngine(say("hello")) as engine:
        client = EngineClient(engine.url)
        client.enforces_schemas = is_ours
        await client.chat("base", [{"role": "user", "content": "go"}], [LOOK, PING], tool_choice=tool_choice)
        await client.close()
        return engine.requests[0]["tools"]


def test_an_engine_elsewhere_is_asked_to_keep_to_the_schema_of_a_forced_call():
    look, ping = (tool["function"] for tool in asyncio.run(sent_tools("required")))
    assert look == {**LOOK["function"], "strict": True}
    assert ping["strict"] and ping["parameters"] == {"type": "object", "properties": {}}
    assert asyncio.run(sent_tools("auto")) == [LOOK, PING]


def test_the_prompt_of_our_own_engine_is_the_same_whether_a_call_is_forced_or_not():
    assert asyncio.run(sent_tools("required", is_ours=True)) == [LOOK, PING]
