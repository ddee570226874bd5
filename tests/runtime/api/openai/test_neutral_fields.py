"""Fields that clients send by habit, and fields that vLLM understands beyond OpenAI's."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.runtime.api.playing import PlayedWorld

HI = [{"role": "user", "content": "hi"}]
OF_THE_ENGINE = {
    "top_k": 7,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "chat_template_kwargs": {"enable_thinking": False},
}


@pytest.fixture
def world(shared: PlayedWorld) -> PlayedWorld:
    shared.begin_anew()
    return shared


def send(http: httpx.Client, api: str, **more: Any) -> httpx.Response:
    if api == "chat":
        return http.post("/v1/chat/completions", json={"model": "agent", "messages": HI, **more})
    return http.post("/v1/responses", json={"model": "agent", "input": "hi", **more})


@pytest.mark.parametrize(
    ("api", "field"),
    [
        ("chat", {"verbosity": "low"}),
        ("responses", {"text": {"verbosity": "low"}}),
        ("responses", {"include": ["reasoning.encrypted_content", "file_search_call.results"]}),
        ("responses", {"include": []}),
    ],
)
def test_a_harmless_field_changes_nothing(
    world: PlayedWorld, http: httpx.Client, api: str, field: dict[str, Any]
) -> None:
    assert send(http, api).status_code == 200
    answer = send(http, api, **field)
    assert answer.status_code == 200, answer.text
    assert world.fake.requests[-1] == world.fake.requests[-2]


@pytest.mark.parametrize("effort", ["none", "high"])
def test_the_effort_goes_to_the_engine(world: PlayedWorld, client: openai.OpenAI, effort: str) -> None:
    client.chat.completions.create(model="agent", messages=HI, reasoning_effort=effort)
    assert world.fake.requests[-1]["reasoning_effort"] == effort
    answer = client.responses.create(model="agent", input="hi", reasoning={"effort": effort})
    assert world.fake.requests[-1]["reasoning_effort"] == effort == answer.reasoning.effort


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_what_vllm_understands_goes_to_it(world: PlayedWorld, http: httpx.Client, api: str) -> None:
    answer = send(http, api, **OF_THE_ENGINE)
    assert answer.status_code == 200, answer.text
    sent = world.fake.requests[-1]
    assert {name: sent[name] for name in OF_THE_ENGINE} == OF_THE_ENGINE


@pytest.mark.parametrize(
    ("api", "field"),
    [
        ("chat", {"reasoning_effort": "enormous"}),
        ("chat", {"min_p": 2}),
        ("responses", {"include": ["message.output_text.logprobs"]}),
        ("responses", {"reasoning": {"effort": "enormous"}}),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(
    world: PlayedWorld, http: httpx.Client, api: str, field: dict[str, Any]
) -> None:
    answer = send(http, api, **field)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(next(iter(field)))
    assert world.num_trajectories == 0
