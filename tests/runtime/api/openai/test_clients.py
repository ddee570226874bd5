"""Common clients over real HTTP: the server parses their requests, and they parse its answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Any

import httpx
import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from memory.schema import StepKind, TrajectoryStage
from optimizer.data.stitching import stitch
from optimizer.rewards import grade
from tests.runtime.api.playing import WEATHER, PlayedWorld
from tests.runtime.fake_engine import LOOK, Reply

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def world(shared: PlayedWorld) -> PlayedWorld:
    shared.begin_anew()
    return shared


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return {"Oslo": "rain", "Rome": "sun"}[city]


def chat_model(world: PlayedWorld, **more: Any) -> ChatOpenAI:
    settings = {"model": "agent", "base_url": f"{world.url}/v1", "api_key": "none", "max_retries": 0}
    return ChatOpenAI(**settings | more)


# the official package


def test_every_parameter_reaches_the_engine(world: PlayedWorld, client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    client.chat.completions.create(
        model="agent",
        messages=HI,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["\n"],
        max_tokens=5,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}},
        logprobs=True,
        top_logprobs=2,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        user="me",
        metadata={"mine": "kept to myself"},
        n=1,
        store=False,
    )
    sent = world.fake.requests[-1]
    wanted = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["\n"], "max_tokens": 5, "top_logprobs": 2}
    wanted |= {"frequency_penalty": 0.1, "presence_penalty": 0.2, "logprobs": True, "tool_choice": "required"}
    wanted |= {"parallel_tool_calls": False}
    assert {name: sent.get(name) for name in wanted} == wanted
    assert sent["response_format"]["json_schema"]["schema"] == schema
    assert sent["tools"] == [
        {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    ]  # forced calls are strict
    assert "user" not in sent and "metadata" not in sent


@pytest.mark.parametrize("tool_choice", ["auto", "none", {"type": "function", "function": {"name": "weather"}}])
def test_every_tool_choice_reaches_the_engine(world: PlayedWorld, client: openai.OpenAI, tool_choice: Any) -> None:
    client.chat.completions.create(model="agent", messages=HI, tools=[WEATHER], tool_choice=tool_choice)
    assert world.fake.requests[-1]["tool_choice"] == tool_choice


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_token_by_token(client: openai.OpenAI, stream: bool) -> None:
    asked = {"model": "agent", "messages": HI, "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **asked))
        tokens = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    else:
        tokens = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == "You said: hi"
    assert [other.token for other in tokens[0].top_logprobs] == ["a", "b"]


def test_without_asking_there_are_no_logprobs(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model="agent", messages=HI).choices[0].logprobs is None


class City(BaseModel):
    city: str


def test_a_schema_is_parsed_by_the_client(world: PlayedWorld, client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="agent", messages=HI, response_format=City)
    assert parsed.choices[0].message.parsed == City(city="Oslo")
    assert world.fake.requests[-1]["response_format"]["json_schema"]["name"] == "City"


def test_the_client_s_own_stream_helper_adds_the_pieces_up(client: openai.OpenAI) -> None:
    asked = [{"role": "user", "content": "How are Oslo and Rome?"}]
    with client.chat.completions.stream(model="agent", messages=asked, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    calls = answer.choices[0].message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Oslo", "Rome"]
    assert "tool_calls.function.arguments.delta" in kinds
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_asynchronous_clients_are_answered_side_by_side(world: PlayedWorld) -> None:
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model="agent", messages=[{"role": "user", "content": str(number)}])
                for number in range(8)
            )
        )
    assert [answer.choices[0].message.content for answer in answers] == [f"You said: {n}" for n in range(8)]
    assert len({answer.id for answer in answers}) == 8


def test_a_cut_answer_says_so(world: PlayedWorld, client: openai.OpenAI) -> None:
    world.fake.script = lambda request: Reply("You sa", is_cut=True)
    assert client.chat.completions.create(model="agent", messages=HI).choices[0].finish_reason == "length"


def test_a_call_that_was_cut_is_not_said_to_be_complete(world: PlayedWorld, client: openai.OpenAI) -> None:
    world.fake.script = lambda request: Reply(calls=[("look", '{"where": "Os')], is_cut=True)
    answer = client.chat.completions.create(model="agent", messages=HI, tools=[LOOK])
    assert answer.choices[0].finish_reason == "length"
    chunks = client.chat.completions.create(model="agent", messages=HI, tools=[LOOK], stream=True)
    assert [it.choices[0].finish_reason for it in chunks if it.choices and it.choices[0].finish_reason] == ["length"]
    tools = [{"type": "function", **LOOK["function"], "strict": None}]
    response = client.responses.create(model="agent", input="hi", tools=tools)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        ({"extra_body": {"best_of": 3}}, "best_of"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"messages": [{"role": "tool", "content": "x"}]}, None),
        ({"messages": [*HI, {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[1].tool_call_id"),
        ({"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, None),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: openai.OpenAI, more: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "agent", "messages": HI} | more)
    assert refused.value.type == "invalid_request_error" and refused.value.code
    assert param is None or refused.value.param == param


def test_a_schema_that_the_engine_refuses_is_the_request_s_fault(world: PlayedWorld, client: openai.OpenAI) -> None:
    world.fake.script = lambda request: Reply(status=400, error="the grammar is too deep")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="the grammar is too deep") as refused:
            client.chat.completions.create(model="agent", messages=HI, stream=stream)
        assert refused.value.code == "request_refused"


def test_a_full_context_has_openai_s_own_code(world: PlayedWorld, client: openai.OpenAI) -> None:
    said = "This model's maximum context length is 2048 tokens."
    world.fake.script = lambda request: Reply(status=400, error=said)
    with pytest.raises(openai.BadRequestError, match="2048") as refused:
        client.chat.completions.create(model="agent", messages=HI)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


# LangChain


def test_langchain_s_chat_model_invokes_and_counts(world: PlayedWorld) -> None:
    answer = chat_model(world, temperature=0).invoke("hi")
    assert answer.content == "You said: hi"
    assert answer.usage_metadata["output_tokens"] == len("You said: hi")
    assert answer.response_metadata["id"] == world.newest.id


async def test_langchain_s_chat_model_streams(world: PlayedWorld) -> None:
    whole: AIMessageChunk | None = None
    async with openai.DefaultAsyncHttpxClient() as connections:  # LangChain never closes its own
        model = chat_model(world, stream_usage=True, http_async_client=connections)
        async for piece in model.astream("hi"):
            whole = piece if whole is None else whole + piece
    assert whole.content == "You said: hi"
    assert whole.usage_metadata["output_tokens"] == len("You said: hi")


def test_langchain_s_chat_model_binds_tools_and_shapes(world: PlayedWorld) -> None:
    answer = chat_model(world).bind_tools([weather], tool_choice="weather").invoke("How is Oslo?")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"city": "Oslo"})]
    assert chat_model(world).with_structured_output(City).invoke("Which city?") == City(city="Oslo")


MINE = {"extra_body": {"metadata": {"episode_id": "mine"}}}


@pytest.mark.parametrize("settings", [{}, {"streaming": True, **MINE}, {"use_responses_api": True}])
def test_an_agent_of_langchain_is_one_trajectory_without_knowing_of_us(
    world: PlayedWorld, http: httpx.Client, settings: dict[str, Any]
) -> None:
    agent = create_agent(chat_model(world, **settings), [weather], system_prompt="You know the weather.")
    messages = agent.invoke({"messages": [HumanMessage("How are Oslo and Rome?")]})["messages"]
    assert "Heard: rain, sun" in str(messages[-1].content)
    assert [message.type for message in messages] == ["human", "ai", "tool", "tool", "ai"]
    assert world.num_trajectories == 1
    trajectory = world.newest
    opening = world.memory.trajectories.get(trajectory.id).opening
    assert trajectory.stage is TrajectoryStage.FINISHED and opening[0]["content"] == "You know the weather."
    steps = world.memory.trajectories.steps(trajectory.id)
    assert [step.kind for step in steps] == [StepKind.MODEL, StepKind.TOOL, StepKind.TOOL, StepKind.MODEL]

    # LangChain keeps an answer's id, except for a stream of chat completions, which needs an episode id.
    said_last = messages[-1].response_metadata.get("id")
    target = {"target": said_last} if said_last else {"episode_id": "mine"}
    assert http.post("/v1/feedback", json=target | {"value": 1.0}).status_code == 201
    graded = grade(world.memory)[-1]
    assert graded.is_success and stitch(graded.steps)[1] == {"clean": 1}


async def test_agents_of_langchain_run_side_by_side_without_mixing(world: PlayedWorld) -> None:
    asked = [f"{number}: how is {city}?" for number in range(3) for city in ("Oslo", "Rome")]
    async with openai.DefaultAsyncHttpxClient() as connections:
        agent = create_agent(chat_model(world, http_async_client=connections), [weather])
        ended = await asyncio.gather(*(agent.ainvoke({"messages": [HumanMessage(text)]}) for text in asked))
    assert [end["messages"][-1].content for end in ended] == ["Heard: rain", "Heard: sun"] * 3
    assert world.num_trajectories == len(asked)
    newest = world.memory.trajectories.select(limit=len(asked))
    assert {view.trajectory.stage for view in newest} == {TrajectoryStage.FINISHED}


def test_langchain_goes_on_from_a_stored_response(world: PlayedWorld) -> None:
    model = chat_model(world, use_responses_api=True, use_previous_response_id=True).bind_tools([weather])
    asked = HumanMessage("How is Oslo?")
    first = model.invoke([asked])
    assert isinstance(first, AIMessage) and first.response_metadata["id"].startswith("resp_")
    result = weather.invoke(first.tool_calls[0])
    assert "Heard: rain" in str(model.invoke([asked, first, result]).content)
    assert world.num_trajectories == 1


# curl


def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(["curl", "-sS", "--noproxy", "*", *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl_asks_and_streams(world: PlayedWorld) -> None:
    body = {"model": "agent", "messages": HI}
    url, kind = f"{world.url}/v1/chat/completions", ("-H", "content-type: application/json")
    assert json.loads(curl(url, *kind, "-d", json.dumps(body)))["choices"][0]["message"]["content"] == "You said: hi"
    lines = curl(url, "-N", *kind, "-d", json.dumps(body | {"stream": True})).splitlines()
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_curl_reads_errors(world: PlayedWorld) -> None:
    url, kind = f"{world.url}/v1/chat/completions", ("-H", "content-type: application/json")
    said = curl(url, "-w", "%{http_code}", *kind, "-d", '{"model": "gpt-5", "messages": []}')
    assert said.endswith("400") and json.loads(said[:-3])["error"]["code"] == "empty_messages"
