"""All spellings of one conversation have the same digest; different conversations have different ones."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.agent.resume import digest, split_at_answer

USER = {"role": "user", "content": "How is Oslo?"}


def reply(arguments: Any = '{"city": "Oslo"}', **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    } | more


@pytest.mark.parametrize(
    "messages",
    [
        [USER, reply('{"city":"Oslo"}')],
        [USER, reply(content=None, refusal=None, annotations=[], audio=None)],
        [USER, reply({"city": "Oslo"})],
        [{**USER, "content": [{"type": "text", "text": "How is "}, {"type": "text", "text": "Oslo?"}]}, reply()],
        [{**USER, "name": "Ada"}, reply()],
    ],
)
def test_honest_renderings_are_the_same(messages: list[dict[str, Any]]):
    assert digest(messages) == digest([USER, reply()])


def test_a_digest_that_was_stored_still_names_its_conversation():
    assert digest([USER, reply()]) == "f46607027ecf699a9fb7fe58ac1e92d3cf8183a33732b0acb23d3e2a70a1540f"


@pytest.mark.parametrize(
    "messages",
    [
        [USER, reply('{"city": "Rome"}')],
        [USER, reply(content="I look.")],
        [{**USER, "content": "How is Rome?"}, reply()],
        [{**USER, "role": "system"}, reply()],
        [USER, USER, reply()],
        [USER, reply("not json")],
    ],
)
def test_anything_else_is_another_conversation(messages: list[dict[str, Any]]):
    assert digest(messages) != digest([USER, reply()])


def test_only_results_and_words_of_the_user_go_on_from_a_reply():
    result = {"role": "tool", "tool_call_id": "1", "content": "rain"}
    assert split_at_answer([USER, reply(), result, USER]) == ([USER, reply()], [result, USER])
    assert split_at_answer([USER, reply()]) is None
    assert split_at_answer([USER, reply(), result, {"role": "system", "content": "x"}]) is None
    assert split_at_answer([USER, {"role": "assistant", "content": "hello"}, USER]) is None
