"""Chat completions, by the official OpenAI client."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from memory.schema import TrajectoryStage
from tests.runtime.api.worlds import ServedWorld
from tests.support.waiting import eventually

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
PLAY = {"environment": "doors", "task": "52"}


def ask(client: openai.OpenAI, text: str = "hello", **more):
    return client.chat.completions.create(model="agent", messages=[{"role": "user", "content": text}], **more)


def test_the_official_client_gets_an_answer_whose_id_is_its_trajectory(
    world: ServedWorld, client: openai.OpenAI
) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == "You said: hello"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 3)
    assert answer.model == "agent@v0"
    assert world.memory.trajectories.get(answer.id).stage is TrajectoryStage.FINISHED


def test_headers_name_the_trajectory_and_the_policy(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="agent", messages=[{"role": "user", "content": "hi"}])
    assert raw.headers["x-trajectory-id"] == raw.parse().id
    assert raw.headers["x-policy"] == "v0"


def test_a_stream_brings_role_words_ending_and_usage(world: ServedWorld, client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "You said: hello"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == 13 and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    assert world.memory.trajectories.get(chunks[0].id).stage is TrajectoryStage.FINISHED


def test_a_stream_ends_with_done(http: httpx.Client) -> None:
    body = {"model": "agent", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_the_asynchronous_client_streams_too(world: ServedWorld) -> None:
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="agent", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "You said: hi"


def test_a_client_s_own_tool_comes_back_as_a_call(client: openai.OpenAI) -> None:
    choice = ask(client, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.name == "weather"
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Oslo"}'


def test_a_stream_brings_tool_calls(client: openai.OpenAI) -> None:
    chunks = list(ask(client, tools=[WEATHER], stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_task_is_played_on_the_server_and_rewarded(world: ServedWorld, client: openai.OpenAI) -> None:
    answer = ask(client, "play", metadata=PLAY)
    played = answer.model_extra["ratchet"]
    assert answer.choices[0].message.content == "You opened the left door."
    assert answer.choices[0].message.tool_calls is None
    assert (played["reward"], played["success"], played["stage"]) == (1.0, True, "finished")
    assert (played["num_steps"], played["num_turns"], played["policy"]) == (2, 1, "v0")
    assert world.memory.trajectories.effective_reward(answer.id) == 1.0


def test_a_task_can_be_streamed_and_needs_no_messages(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="agent", messages=[], metadata=PLAY, stream=True)
    chunks = list(stream)
    assert chunks[1].choices[0].delta.content == "You opened the left door."
    assert chunks[-1].model_extra["ratchet"]["success"] is True


def test_a_pinned_policy_answers(world: ServedWorld, client: openai.OpenAI, http: httpx.Client) -> None:
    http.post("/v1/cycles", json={})
    assert eventually(lambda: world.memory.policies.active().version == 1)
    messages = [{"role": "user", "content": "hello"}]
    assert client.chat.completions.create(model="agent@v0", messages=messages).model == "agent@v0"
    assert client.chat.completions.create(model="agent@v1", messages=messages).model == "agent@v1"
    assert world.engine.calls[-1]["messages"][0] == {"role": "system", "content": "The left one!"}


def test_sampling_reaches_the_engine(world: ServedWorld, client: openai.OpenAI) -> None:
    ask(client, temperature=0.5, top_p=0.9, seed=7, stop=["\n"], max_completion_tokens=5)
    call = world.engine.calls[-1]
    assert (call["temperature"], call["top_p"], call["stop"], call["max_tokens"]) == (0.5, 0.9, ["\n"], 5)


def test_the_models_page_lists_the_alias_and_every_pin(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["agent", "agent@v0"]
    assert client.models.retrieve("agent@v0").id == "agent@v0"


@pytest.mark.parametrize("name", ["gpt-5", "agent@v7", "agent@", "agent@latest", "Agent"])
def test_an_unknown_model_is_named_with_those_there_are(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match=r"there is: agent, agent@v0") as refused:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])
    assert repr(name) in str(refused.value)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"environment": "chess", "task": "1"}, "no environment is called 'chess'; there is: doors"),
        ({"environment": "doors", "task": "the red one"}, "doors has no task 'the red one'"),
    ],
)
def test_an_unknown_environment_or_task_is_named(client: openai.OpenAI, metadata: dict, said: str) -> None:
    with pytest.raises(openai.NotFoundError, match=said):
        ask(client, metadata=metadata)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"metadata": {"environment": "doors"}}, "metadata.task is missing"),
        ({"metadata": PLAY | {"use_memory": "maybe"}}, "'on' or 'off', not 'maybe'"),
        ({"metadata": PLAY | {"seed": "x"}}, "metadata.seed must be a whole number"),
        ({"metadata": PLAY | {"split": "practice"}}, "is 'held-out', not"),
        ({"metadata": PLAY, "tools": [WEATHER]}, "brings its own tools"),
        ({"n": 2}, "n=2 is not supported"),
        ({"temperature": 9}, "temperature"),
        ({"tools": [{"type": "magic"}]}, "tools of type 'magic' are not supported"),
        ({"tools": [{"type": "function", "name": "flat"}]}, "a tool is"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, more: dict, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(client, **more)


def test_an_empty_message_list_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="messages is empty") as refused:
        client.chat.completions.create(model="agent", messages=[])
    assert refused.value.code == "empty_messages"


@pytest.mark.parametrize("body", ['{"model": "agent", "messages": [', "hello", "", "[1, 2"])
def test_malformed_json_is_a_bad_request(http: httpx.Client, body: str) -> None:
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_engine_that_is_not_ready_says_when_to_come_again(world: ServedWorld, http: httpx.Client) -> None:
    world.engine.is_ready = False
    answer = http.post("/v1/chat/completions", json={"model": "agent", "messages": [{"role": "user", "content": "x"}]})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "engine_not_ready"


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_episode_names_its_error_and_its_trajectory(
    world: ServedWorld, client: openai.OpenAI, stream: bool
) -> None:
    with pytest.raises(openai.InternalServerError, match="the engine broke off") as failed:
        ask(client, "crash", stream=stream)
    assert failed.value.status_code == 502 and failed.value.code == "PolicyError"
    kept = world.memory.trajectories.get(failed.value.body["trajectory_id"])
    assert kept.stage is TrajectoryStage.FAILED


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_episode(world: ServedWorld, stream: bool) -> None:
    body = {"model": "agent", "messages": [{"role": "user", "content": "wait"}], "stream": stream}
    async with httpx.AsyncClient(base_url=world.url, trust_env=False, timeout=60) as leaving:
        asking = asyncio.ensure_future(leaving.post("/v1/chat/completions", json=body))
        while not world.engine.calls:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait({asking})
    assert eventually(lambda: world.engine.num_cut_off == 1)
    assert eventually(lambda: world.memory.trajectories.select()[0].trajectory.stage is TrajectoryStage.CANCELLED)
