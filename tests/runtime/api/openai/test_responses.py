"""The Responses API, by the official OpenAI client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from memory.schema import TrajectoryStage
from tests.runtime.api.playing import PlayedWorld
from tests.runtime.fake_engine import Reply, call

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


@pytest.fixture
def world(shared: PlayedWorld) -> PlayedWorld:
    shared.begin_anew()
    return shared


def ask(client: openai.OpenAI, given: Any = "hi", **more: Any):
    return client.responses.create(model="agent", input=given, **more)


def output_of(response: Any, text: str) -> list[dict[str, Any]]:
    (call,) = (item for item in response.output if item.type == "function_call")
    return [{"type": "function_call_output", "call_id": call.call_id, "output": text}]


def test_a_text_is_answered_and_leads_to_its_trajectory(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client
) -> None:
    response = ask(client, instructions="Be brief.", temperature=0.5, max_output_tokens=50, metadata={"mine": "1"})
    assert (response.output_text, response.status, response.model) == ("You said: hi", "completed", "agent@v0")
    assert response.usage.output_tokens == len("You said: hi")
    assert (response.instructions, response.metadata, response.store) == ("Be brief.", {"mine": "1"}, True)
    sent = world.fake.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"]) == (0.5, 50)
    posted = http.post("/v1/feedback", json={"target": response.id, "value": True}).json()
    assert posted["trajectory_id"] == world.newest.id


def test_the_events_come_in_the_official_order(client: openai.OpenAI) -> None:
    events = list(ask(client, stream=True))
    kinds = [event.type for event in events]
    head, tail = kinds[:4], kinds[-4:]
    assert head == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert tail == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == "You said: hi" == events[-4].text
    assert events[0].response.status == "in_progress" and events[-1].response.output_text == "You said: hi"
    assert len({event.response.id for event in (*events[:2], events[-1])}) == 1
    assert client.responses.retrieve(events[-1].response.id) == events[-1].response


def test_a_function_call_is_streamed_in_pieces(client: openai.OpenAI) -> None:
    with client.responses.stream(model="agent", input="How is Oslo?", tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert kinds[2] == "response.output_item.added" and kinds[-2:] == [
        "response.output_item.done",
        "response.completed",
    ]
    assert kinds.count("response.function_call_arguments.delta") > 1
    assert "response.function_call_arguments.done" in kinds
    assert [(item.name, item.arguments) for item in response.output] == [("weather", '{"city": "Oslo"}')]


@pytest.mark.parametrize("stream", [False, True])
def test_function_outputs_go_on_with_the_same_trajectory(
    world: PlayedWorld, client: openai.OpenAI, stream: bool
) -> None:
    first = ask(client, "How is Oslo?", tools=[WEATHER], instructions="Be brief.")
    more = {"previous_response_id": first.id, "tools": [WEATHER], "stream": stream}
    last = ask(client, output_of(first, "rain"), **more)
    response = list(last)[-1].response if stream else last
    assert (response.output_text, response.previous_response_id) == ("Heard: rain", first.id)
    assert response.instructions == "Be brief."  # an episode keeps its instructions
    assert response.id != first.id and world.num_trajectories == 1
    assert (world.newest.stage, world.newest.answer) == (TrajectoryStage.FINISHED, "Heard: rain")


def test_whole_items_sent_back_go_on_too(world: PlayedWorld, client: openai.OpenAI) -> None:
    given: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "How is Oslo?"}]}]
    first = ask(client, given, tools=[WEATHER], store=False)
    last = ask(client, [*given, *first.output, *output_of(first, "rain")], tools=[WEATHER], store=False)
    assert last.output_text == "Heard: rain" and world.num_trajectories == 1
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last.id)


def test_an_answered_episode_is_gone_on_from_in_a_new_one(world: PlayedWorld, client: openai.OpenAI) -> None:
    first = ask(client, "one", instructions="Be brief.")
    second = ask(client, "two", previous_response_id=first.id)
    third = ask(client, "three", previous_response_id=second.id)
    assert [message["content"] for message in world.fake.requests[-1]["messages"]] == [
        "one",
        "You said: one",
        "two",
        "You said: two",
        "three",
    ]
    assert third.instructions is None and world.num_trajectories == 3


def test_a_stored_response_is_read_and_forgotten(world: PlayedWorld, client: openai.OpenAI, http: httpx.Client) -> None:
    response = ask(client, [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])
    assert client.responses.retrieve(response.id) == response
    items = list(client.responses.input_items.list(response.id, order="asc", limit=1))
    assert [item.content[0].text for item in items] == ["one", "two"]
    client.responses.delete(response.id)
    for look_for in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match=response.id) as refused:
            look_for(response.id)
        assert refused.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, previous_response_id=response.id)
    assert (refused.value.param, refused.value.code) == ("previous_response_id", "previous_response_not_found")
    assert world.newest.stage is TrajectoryStage.FINISHED  # the trajectory stays
    assert http.post("/v1/feedback", json={"target": response.id, "value": 1}).status_code == 201


class City(BaseModel):
    city: str


def test_a_schema_is_parsed_by_the_client(world: PlayedWorld, client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="agent", input="Which city?", text_format=City)
    assert parsed.output_parsed == City(city="Oslo")
    assert world.fake.requests[-1]["response_format"]["json_schema"]["strict"] is True


async def test_the_asynchronous_client_asks_and_streams(world: PlayedWorld) -> None:
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        assert (await client.responses.create(model="agent", input="hi")).output_text == "You said: hi"
        async with client.responses.stream(model="agent", input="hi") as stream:
            assert (await stream.get_final_response()).output_text == "You said: hi"


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_answer_is_incomplete(world: PlayedWorld, client: openai.OpenAI, stream: bool) -> None:
    world.fake.script = lambda request: Reply("You sa", is_cut=True)
    answer = ask(client, stream=stream)
    if stream:
        last = list(answer)[-1]
        assert last.type == "response.incomplete"
        answer = last.response
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_a_task_is_played_on_the_server(world: PlayedWorld, client: openai.OpenAI, stream: bool) -> None:
    world.fake.script = lambda request: call("open", door="left")
    answer = ask(client, [], metadata={"environment": "doors", "task": "52"}, stream=stream)
    response = list(answer)[-1].response if stream else answer
    assert response.output_text == "You opened the left door."
    assert world.memory.trajectories.effective_reward(world.newest.id) == 1.0


def test_a_failure_in_mid_stream_is_an_event(world: PlayedWorld, client: openai.OpenAI) -> None:
    world.fake.breaks_off_after = 3
    events = list(ask(client, stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error" and events[-1].response.error.message
    world.fake.breaks_off_after = None
    world.fake.script = lambda request: Reply(status=500, error="out of luck")
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="out of luck") as failed:
            ask(client, stream=stream)
        assert failed.value.status_code == 502


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "file_search", "vector_store_ids": ["x"]}]}, "tools[0].type"),
        ({"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}, "tools[0].type"),
        ({"tools": [{"type": "mcp", "server_label": "x", "server_url": "y"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"text": {"tone": "kind"}}, "text.tone"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"extra_body": {"seed": 3}}, "seed"),
        ({"input": ""}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input"),
        ({"temperature": 9}, "temperature"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(untouched: openai.OpenAI, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        untouched.responses.create(**{"model": "agent", "input": "hi"} | more)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error" and refused.value.code


@pytest.mark.parametrize(
    "more",
    [
        {"input": 5},
        {"input": [5]},
        {"input": [{}]},
        {"input": [{"role": "user", "content": 5}]},
        {"input": [{"role": "user", "content": None}]},
        {"input": [{"role": ["user"], "content": "x"}]},
        {"input": [{"role": "user", "content": ["x"]}]},
        {"input": [{"type": "function_call", "call_id": 5, "name": "f", "arguments": "{}"}]},
        {"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"}]},
        {"tools": [{}]},
        {"tools": [{"type": "function", "name": 5}]},
        {"tools": [{"type": "function", "name": "f", "colour": "red"}]},
        {"tool_choice": {"type": []}},
        {"text": {"format": {"type": {}}}},
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        {"metadata": {"seed": 5}},
        {"stream_options": {"include_obfuscation": True}},
    ],
)
def test_nonsense_is_a_bad_request(untouched: openai.OpenAI, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        untouched.post("/responses", body={"model": "agent", "input": "hi"} | more, cast_to=object)
    assert set(refused.value.body) >= {"message", "type", "param", "code"}


def test_what_is_no_unicode_is_mended_and_sent_back(client: openai.OpenAI, http: httpx.Client) -> None:
    body = '{"model": "agent", "input": "hi", "tools": [{"type": "function", "name": "f", "description": "\\ud800"}]}'
    answer = http.post("/v1/responses", content=body, headers={"content-type": "application/json"})
    assert answer.json()["tools"][0]["description"] == "\ufffd"
    assert client.responses.retrieve(answer.json()["id"]).output_text == "You said: hi"
