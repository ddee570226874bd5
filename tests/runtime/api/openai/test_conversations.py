"""Conversations made to be slow, and names that are invalid in a header: refused before an episode is opened."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from runtime.api.errors import BadRequest
from runtime.api.openai.chat_request import check_tool_results
from tests.runtime.api.worlds import ServedWorld

HELLO = {"role": "user", "content": "hello"}


def calls_and_results(num: int) -> list[dict[str, Any]]:
    """A reply with tool calls, and their results in reverse: the worst case for a linear search."""
    calls = [{"id": f"call-{at}", "type": "function", "function": {"name": "f", "arguments": ""}} for at in range(num)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": ""} for call in reversed(calls)]
    return [HELLO, {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def test_many_results_in_reverse_are_checked_in_linear_time() -> None:
    messages = calls_and_results(60_000)
    started = time.process_time()
    check_tool_results(messages)
    assert time.process_time() - started < 1.0


def test_each_call_has_as_many_results_as_calls() -> None:
    messages = calls_and_results(2)
    with pytest.raises(BadRequest, match="'call-1' answers no open tool call"):
        check_tool_results([*messages, messages[2]])
    with pytest.raises(BadRequest, match="the tool call 'call-0' has no result"):
        check_tool_results(messages[:-1])
    twice = [HELLO, {**messages[1], "tool_calls": messages[1]["tool_calls"][:1] * 2}, messages[3], messages[3]]
    check_tool_results(twice)


def test_too_many_messages_are_refused_before_any_is_looked_at(http: httpx.Client) -> None:
    orphan = {"role": "tool", "tool_call_id": "none", "content": ""}  # refused as well, but later
    chat = http.post("/v1/chat/completions", json={"model": "agent", "messages": [orphan] * 4097})
    response = http.post("/v1/responses", json={"model": "agent", "input": [{"type": "unheard of"}] * 4097})
    for answer, field in ((chat, "messages"), (response, "input")):
        assert answer.status_code == 400
        assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("too_many_messages", field)


def test_the_id_of_a_call_is_a_text(http: httpx.Client) -> None:
    call = {"id": ["a", "list"], "type": "function", "function": {"name": "f", "arguments": ""}}
    body = {"model": "agent", "messages": [HELLO, {"role": "assistant", "tool_calls": [call]}]}
    answer = http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("episode_id", ["a\r\nSet-Cookie: b=c", "tab\there", "snow☃", "\x00", "\x85", " a", "a" * 513])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_an_episode_whose_name_no_header_can_repeat_is_not_played(
    world: ServedWorld, http: httpx.Client, episode_id: str, is_streamed: bool
) -> None:
    body = {"model": "agent", "stream": is_streamed, "metadata": {"episode_id": episode_id}}
    chat = http.post("/v1/chat/completions", json={**body, "messages": [HELLO]})
    response = http.post("/v1/responses", json={**body, "input": "hello"})
    for answer in (chat, response):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "metadata.episode_id"
    assert (world.engine.calls, world.memory.trajectories.select()) == ([], [])


@pytest.mark.parametrize("episode_id", ["ticket-4711", "Ärger mit Ø", "a b", "x" * 512])
def test_the_header_repeats_the_name_of_an_episode(http: httpx.Client, episode_id: str) -> None:
    body = {"model": "agent", "messages": [HELLO], "metadata": {"episode_id": episode_id}}
    answer = http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.headers["x-episode-id"]) == (200, episode_id)
