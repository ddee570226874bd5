"""The maximum length of an answer: the client's number, the context and the operator's limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from runtime.config import AgentConfig
from tests.runtime.api.playing import FORGETFUL, PlayedWorld
from tests.runtime.api.worlds import ServedWorld

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def world(shared: PlayedWorld) -> PlayedWorld:
    shared.begin_anew()
    return shared


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[openai.OpenAI]:
    config = AgentConfig(max_output_tokens=100, max_total_tokens=1_000)
    with (
        ServedWorld(tmp_path / "data", config=config, memory_config=FORGETFUL) as world,
        openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client,
    ):
        client.sent = world.engine.calls
        yield client


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_clients_number_counts_in_a_chat(world: PlayedWorld, client: openai.OpenAI, name: str) -> None:
    client.chat.completions.create(model="agent", messages=HI, **{name: 1000})
    assert world.fake.requests[-1]["max_tokens"] == 1000


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_number_counts_in_a_response_and_is_echoed(
    world: PlayedWorld, client: openai.OpenAI, stream: bool
) -> None:
    assert ask(client, stream, 1000).max_output_tokens == 1000
    assert world.fake.requests[-1]["max_tokens"] == 1000


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_context_leaves_is_echoed_as_what_it_leaves(
    world: PlayedWorld, client: openai.OpenAI, stream: bool
) -> None:
    left = world.fake.max_model_len - len(world.fake.render_prompt({"messages": HI}))
    assert ask(client, stream, 100_000).max_output_tokens == left


def test_an_ordinary_answer_has_room_where_no_number_is_named(world: PlayedWorld, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="agent", messages=HI)
    assert world.fake.requests[-1]["max_tokens"] == AgentConfig().default_output_tokens >= 2048


def test_a_move_in_an_environment_stays_short(world: PlayedWorld, client: openai.OpenAI) -> None:
    play = {"environment": "doors", "task": "50"}
    client.chat.completions.create(model="agent", messages=[], metadata=play)
    assert world.fake.requests[-1]["max_tokens"] == 512


def test_more_than_the_operator_allows_is_refused_with_the_settings_name(limited: openai.OpenAI) -> None:
    for ask_for, param in ((ask_chat("max_tokens"), "max_tokens"), (ask_response, "max_output_tokens")):
        with pytest.raises(openai.BadRequestError) as refused:
            ask_for(limited, 101)
        assert (refused.value.param, refused.value.code) == (param, "too_many_tokens")
        assert "agent.max_output_tokens" in refused.value.message and "100" in refused.value.message
        ask_for(limited, 100)
        assert limited.sent[-1]["max_tokens"] == 100


def test_the_default_stays_below_the_operators_limit(limited: openai.OpenAI) -> None:
    limited.chat.completions.create(model="agent", messages=HI)
    assert limited.sent[-1]["max_tokens"] == 100


def test_more_than_an_episode_may_use_is_refused_too(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"agent\.max_total_tokens"):
        client.chat.completions.create(model="agent", messages=HI, max_tokens=200_001)


def ask(client: openai.OpenAI, stream: bool, max_tokens: int) -> Any:
    answer = client.responses.create(model="agent", input="hi", max_output_tokens=max_tokens, stream=stream)
    return list(answer)[-1].response if stream else answer


def ask_response(client: openai.OpenAI, max_tokens: int) -> None:
    ask(client, False, max_tokens)


def ask_chat(name: str) -> Any:
    return lambda client, number: client.chat.completions.create(model="agent", messages=HI, **{name: number})
