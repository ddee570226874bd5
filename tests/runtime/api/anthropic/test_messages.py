"""Anthropic's Messages API by the official package: answers, streams, tools, errors and counts, over real HTTP."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic import beta_tool
from pydantic import BaseModel

from memory.schema import StepKind, TrajectoryStage
from tests.runtime.api.playing import WEATHER as CHAT_WEATHER
from tests.runtime.api.playing import PlayedWorld
from tests.runtime.api.worlds import error_code
from tests.runtime.fake_engine import Reply, call, say

HI: list[Any] = [{"role": "user", "content": "hi"}]
ASKED: dict[str, Any] = {"role": "user", "content": "How is Oslo?"}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": CHAT_WEATHER["function"]["parameters"],
}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}


@pytest.fixture
def world(shared: PlayedWorld) -> PlayedWorld:
    shared.begin_anew()
    return shared


def ask(client: anthropic.Anthropic, messages: list[Any], **more: Any) -> Any:
    return client.messages.create(**{"model": "agent", "max_tokens": 64, "messages": messages} | more)


def result(call_id: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": content, **more}]}


def shown(world: PlayedWorld) -> list[tuple[str, str]]:
    """Return the messages of the engine's last request."""
    return [(message["role"], message["content"]) for message in world.fake.requests[-1]["messages"]]


# answers


def test_the_id_of_a_message_leads_to_its_record_and_takes_feedback(
    world: PlayedWorld, claude: anthropic.Anthropic, http: httpx.Client
) -> None:
    answer = claude.messages.with_raw_response.create(
        model="agent", max_tokens=64, messages=HI, metadata={"user_id": "jane"}
    )
    message = answer.parse()
    assert (message.content[0].text, message.stop_reason, message.model) == ("You said: hi", "end_turn", "agent@v0")
    trajectory = world.newest
    assert (trajectory.user_id, trajectory.stage) == ("jane", TrajectoryStage.FINISHED)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (
        trajectory.prompt_tokens,
        trajectory.output_tokens,
    )
    assert message.usage.input_tokens > 0
    assert message._request_id == answer.headers["x-trajectory-id"] == trajectory.id
    assert message.ratchet["trajectory_id"] == trajectory.id
    assert http.get(f"/v1/trajectories/{message.id}").json()["id"] == trajectory.id
    http.post("/v1/feedback", json={"target": message.id, "value": True}).raise_for_status()
    assert world.memory.trajectories.effective_reward(trajectory.id) == 1.0


def test_every_parameter_reaches_the_engine(world: PlayedWorld, claude: anthropic.Anthropic) -> None:
    ask(
        claude,
        HI,
        system=[{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 7},  # no longer arguments of the package
        stop_sequences=["\n"],
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        output_config={"effort": "low"},
        thinking={"type": "disabled"},
        cache_control={"type": "ephemeral"},
        service_tier="auto",
    )
    sent = world.fake.requests[-1]
    wanted = {"max_tokens": 64, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop": ["\n"], "reasoning_effort": "low"}
    assert {name: sent.get(name) for name in wanted} == wanted
    assert sent["parallel_tool_calls"] is False
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert sent["tools"][0]["function"]["parameters"]["required"] == ["city"]
    assert shown(world)[0] == ("system", "Be brief.\nBe kind.")


@pytest.mark.parametrize(("choice", "sent"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_every_tool_choice_reaches_the_engine(
    world: PlayedWorld, claude: anthropic.Anthropic, choice: str, sent: str
) -> None:
    ask(claude, HI, tools=[WEATHER], tool_choice={"type": choice})
    assert world.fake.requests[-1]["tool_choice"] == sent


def test_blocks_are_joined_thinking_is_dropped_and_neighbours_are_one_message(
    world: PlayedWorld, claude: anthropic.Anthropic
) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    said = {"role": "assistant", "content": [thought, hidden, {"type": "text", "text": "Hello."}]}
    text = {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}
    ask(claude, [*HI, said, {"role": "user", "content": [text, {"type": "text", "text": "two"}]}, *HI])
    assert shown(world) == [("user", "hi"), ("assistant", "Hello."), ("user", "one\ntwo\nhi")]


@pytest.mark.parametrize(
    ("reply", "reason", "sequence"),
    [
        (Reply("You sa", is_cut=True), "max_tokens", None),
        (Reply("You said", stopped_by=":"), "stop_sequence", ":"),
        (Reply(calls=[("weather", '{"city": "Os')], is_cut=True), "max_tokens", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_reason_of_the_end_is_named(
    world: PlayedWorld, claude: anthropic.Anthropic, reply: Reply, reason: str, sequence: str | None, stream: bool
) -> None:
    world.fake.script = lambda request: reply
    given = {"model": "agent", "max_tokens": 64, "messages": HI, "tools": [WEATHER], "stop_sequences": [":"]}
    if stream:
        with claude.messages.stream(**given) as events:
            message = events.get_final_message()
    else:
        message = claude.messages.create(**given)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_a_schema_is_parsed_by_the_client(world: PlayedWorld, claude: anthropic.Anthropic) -> None:
    class City(BaseModel):
        city: str

    parsed = claude.messages.parse(model="agent", max_tokens=64, messages=HI, output_format=City)
    assert parsed.parsed_output == City(city="Oslo")
    assert world.fake.requests[-1]["response_format"]["json_schema"]["schema"]["required"] == ["city"]


def test_a_task_is_played_on_the_server(world: PlayedWorld, claude: anthropic.Anthropic) -> None:
    world.fake.script = lambda request: call("open", door="left")
    message = ask(claude, [], metadata={"environment": "doors", "task": "50"})
    assert message.content[0].text == "You opened the left door." and message.ratchet["reward"] == 1.0


# streams


def test_a_stream_is_the_official_sequence_of_events(world: PlayedWorld, http: httpx.Client) -> None:
    world.fake.script = lambda request: Reply("Wait.", calls=[("weather", '{"city": "Oslo"}')])
    body = {"model": "agent", "max_tokens": 64, "messages": [ASKED], "tools": [WEATHER], "stream": True}
    text = http.post("/v1/messages", json=body).text
    events = [event.split("\n") for event in text.removesuffix("\n\n").split("\n\n")]
    kinds = [name.removeprefix("event: ") for name, _ in events]
    datas = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [data["type"] for data in datas] == kinds
    assert [kind for kind in kinds if kind != "content_block_delta"] == [
        *("message_start", "ping", "content_block_start", "content_block_stop"),
        *("content_block_start", "content_block_stop", "message_delta", "message_stop"),
    ]
    deltas = [data for data in datas if data["type"] == "content_block_delta"]
    assert "".join(it["delta"]["text"] for it in deltas if it["index"] == 0) == "Wait."
    assert json.loads("".join(it["delta"]["partial_json"] for it in deltas if it["index"] == 1)) == {"city": "Oslo"}
    started = next(data["content_block"] for data in datas if data.get("index") == 1)
    assert started == {"type": "tool_use", "id": started["id"], "name": "weather", "input": {}}
    assert datas[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert datas[-2]["usage"]["output_tokens"] == world.memory.trajectories.measure(world.newest.id).output_tokens > 0


def test_a_stream_adds_up_to_the_message_without_one(world: PlayedWorld, claude: anthropic.Anthropic) -> None:
    whole = ask(claude, HI)
    with claude.messages.stream(model="agent", max_tokens=64, messages=HI) as stream:
        assert "".join(stream.text_stream) == "You said: hi"
        streamed = stream.get_final_message()
    assert (streamed.content[0].text, streamed.stop_reason, streamed.model) == (
        *("You said: hi", whole.stop_reason),
        whole.model,
    )
    assert (streamed.usage.input_tokens, streamed.usage.output_tokens) == (
        whole.usage.input_tokens,
        whole.usage.output_tokens,
    )


async def test_the_asynchronous_client_answers_and_streams(world: PlayedWorld) -> None:
    async with anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0) as client:
        message = await client.messages.create(model="agent", max_tokens=64, messages=HI)
        async with client.messages.stream(model="agent", max_tokens=64, messages=HI) as stream:
            pieces = [text async for text in stream.text_stream]
    assert message.content[0].text == "".join(pieces) == "You said: hi" and len(pieces) > 1


def test_a_task_can_be_streamed(world: PlayedWorld, claude: anthropic.Anthropic) -> None:
    world.fake.script = lambda request: call("open", door="left")
    metadata: Any = {"environment": "doors", "task": "50"}
    with claude.messages.stream(model="agent", max_tokens=64, messages=[], metadata=metadata) as stream:
        assert "".join(stream.text_stream) == "You opened the left door."


# tools


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop_is_one_trajectory(world: PlayedWorld, claude: anthropic.Anthropic, stream: bool) -> None:
    @beta_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return {"Oslo": "rain", "Rome": "sun"}[city]

    asked: list[Any] = [{"role": "user", "content": "How are Oslo and Rome?"}]
    runner = claude.beta.messages.tool_runner(
        model="agent", max_tokens=64, tools=[weather], messages=asked, stream=stream
    )
    for each in runner:
        last = each.get_final_message() if stream else each
    assert last.content[0].text == "Heard: rain, sun"
    trajectory = world.newest
    assert world.num_trajectories == 1 and trajectory.stage is TrajectoryStage.FINISHED
    steps = world.memory.trajectories.steps(trajectory.id)
    assert [step.kind for step in steps] == [StepKind.MODEL, StepKind.TOOL, StepKind.TOOL, StepKind.MODEL]
    assert last.id == f"msg_{trajectory.id.removeprefix('trj_')}_1"


def test_a_result_in_blocks_and_a_failed_one_reach_the_model_as_text(
    world: PlayedWorld, claude: anthropic.Anthropic
) -> None:
    first = ask(claude, [ASKED], tools=[WEATHER])
    said = {"role": "assistant", "content": first.content}
    blocks = [{"type": "text", "text": "no"}, {"type": "text", "text": "network"}]
    back = result(first.content[0].id, blocks, is_error=True)
    back["content"].append({"type": "text", "text": "Go on."})
    last = ask(claude, [ASKED, said, back], tools=[WEATHER])
    assert last.content[0].text == "Heard: Error: no\nnetwork"
    assert shown(world)[-2:] == [("tool", "Error: no\nnetwork"), ("user", "Go on.")]
    assert world.num_trajectories == 1


@pytest.mark.parametrize("arguments", ['"Oslo"', "[1]", '{"city": ', '{"city": NaN}', "1e999"])
def test_arguments_that_are_no_object_come_back_as_they_were_and_go_on(
    world: PlayedWorld, claude: anthropic.Anthropic, arguments: str
) -> None:
    world.fake.script = lambda request: Reply(calls=[("weather", arguments)])
    first = ask(claude, [ASKED], tools=[WEATHER])
    assert first.content[0].input == {"INVALID_JSON": arguments}
    world.fake.script = say("I see.")
    said = {"role": "assistant", "content": [block.model_dump() for block in first.content]}
    ask(claude, [ASKED, said, result(first.content[0].id, "no such city", is_error=True)], tools=[WEATHER])
    assert world.num_trajectories == 1


def test_a_conversation_can_be_gone_on_with_in_the_other_api(
    world: PlayedWorld, claude: anthropic.Anthropic, client: openai.OpenAI
) -> None:
    first = ask(claude, [ASKED], tools=[WEATHER])
    call_id = first.content[0].id
    function = {"name": "weather", "arguments": json.dumps(first.content[0].input)}
    said = {"role": "assistant", "tool_calls": [{"id": call_id, "type": "function", "function": function}]}
    heard = {"role": "tool", "tool_call_id": call_id, "content": "rain"}
    messages: list[Any] = [ASKED, said, heard]
    last = client.chat.completions.create(model="agent", messages=messages, tools=[CHAT_WEATHER])
    assert last.choices[0].message.content == "Heard: rain" and world.num_trajectories == 1


# refusals


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"messages": []}, "messages is empty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, r"messages\.0\.content\.0: a block of type 'image'"),
        ({"messages": [*HI, {"role": "assistant", "content": [IMAGE]}, *HI]}, r"messages\.1\.content\.0: .*'image'"),
        ({"system": [IMAGE]}, r"system\.0: a block of type 'image'"),
        ({"messages": [ASKED, {"role": "assistant", "content": "It"}]}, "cannot be continued"),
        ({"messages": [*HI, result("call-9", "x")]}, "'call-9' answers no open tool call"),
        ({"messages": [*HI, {"role": "user", "content": [{"type": "tool_result"}]}]}, "needs tool_use_id"),
        (
            {"messages": [*HI, {"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}, *HI]},
            "a tool_use is",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305' are not supported"),
        ({"tools": [{"name": "f"}]}, r"tools\.0: a tool is"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, r"tools\.0\.defer_loading=True is not supported"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice names 'f'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "thinking of type 'enabled'"),
        ({"extra_body": {"mcp_servers": [{"name": "x"}]}}, "mcp_servers"),
        ({"extra_body": {"container": "c"}}, "container='c' is not supported"),
        ({"extra_body": {"thread": {"type": "create"}}}, "thread is not supported: send the whole conversation"),
        ({"extra_body": {"metadata": {"split": "held-out"}}}, r"metadata\.task is missing"),
        ({"metadata": {"user_id": "x" * 513}}, r"metadata\.user_id must be at most 512"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    world: PlayedWorld, claude: anthropic.Anthropic, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask(claude, **{"messages": HI} | more)
    assert re.search(said, refused.value.api_message)
    assert refused.value.type == "invalid_request_error"
    assert world.num_trajectories == 0


def test_a_request_without_a_limit_of_tokens_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/messages", json={"model": "agent", "messages": HI})
    assert answer.status_code == 400 and "max_tokens" in answer.json()["error"]["message"]
    assert answer.json()["type"] == "error" and answer.json()["request_id"] is None


def test_an_unknown_model_is_named_with_those_there_are(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="'claude' does not exist; there is: agent, agent@v0") as missing:
        ask(claude, HI, model="claude")
    assert missing.value.type == "not_found_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_context_is_said_in_the_words_that_clients_know(
    world: PlayedWorld, claude: anthropic.Anthropic, stream: bool
) -> None:
    world.fake.script = lambda request: Reply(status=400, error="This model's maximum context length is 2048 tokens.")
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: .*2048"):
        ask(claude, HI, stream=stream)


def test_a_failed_episode_names_its_record(world: PlayedWorld, claude: anthropic.Anthropic) -> None:
    world.fake.script = lambda request: Reply(status=401, error="who is it?")
    with pytest.raises(anthropic.InternalServerError, match="who is it") as failed:
        ask(claude, HI)
    assert (failed.value.status_code, failed.value.type) == (502, "api_error")
    assert failed.value.request_id == world.newest.id == failed.value.body["request_id"]
    assert world.newest.stage is TrajectoryStage.FAILED


def test_a_failure_within_a_stream_is_its_last_event(world: PlayedWorld, claude: anthropic.Anthropic) -> None:
    world.fake.breaks_off_after = 3
    with (
        claude.messages.stream(model="agent", max_tokens=64, messages=HI) as stream,
        pytest.raises(anthropic.APIStatusError, match="the episode failed") as failed,
    ):
        stream.until_done()
    assert failed.value.type == "api_error" and failed.value.body["request_id"] == world.newest.id


@pytest.mark.parametrize(("status", "error"), [(503, anthropic.OverloadedError), (429, anthropic.OverloadedError)])
def test_a_busy_engine_is_overloaded_and_says_when_to_come_again(
    world: PlayedWorld, claude: anthropic.Anthropic, status: int, error: type[anthropic.APIStatusError]
) -> None:
    world.fake.script = lambda request: Reply(status=status, error="busy")
    with pytest.raises(error, match="busy") as refused:
        ask(claude, HI)
    assert (refused.value.status_code, refused.value.type) == (529, "overloaded_error")
    assert int(refused.value.response.headers["retry-after"]) > 0


def test_the_official_client_retries_what_it_may(world: PlayedWorld) -> None:
    replies = iter([Reply(status=503, error="busy")])
    world.fake.script = lambda request: next(replies, Reply("Here."))
    with anthropic.Anthropic(base_url=world.url, api_key="none", max_retries=2) as client:
        assert ask(client, HI).content[0].text == "Here."
    assert len(world.fake.requests) == 2


def test_errors_have_the_shape_of_the_api_that_was_asked(http: httpx.Client) -> None:
    version = {"anthropic-version": "2023-06-01"}
    for path, headers, is_anthropic in (
        ("/v1/messages", {}, True),
        ("/v1/messages/batches", {}, True),
        ("/v1/nowhere", version, True),
        ("/v1/nowhere", {}, False),
        ("/v1/messages_of_mine", {}, False),
    ):
        answer = http.get(path, headers=headers)
        assert answer.status_code in (404, 405) and error_code(answer) == "no_such_route"
        assert (answer.json().get("type") == "error") == is_anthropic, path


# counts and models


def test_tokens_are_counted_as_the_engine_renders_them(world: PlayedWorld, claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model="agent", messages=HI, system="Be brief.", tools=[WEATHER])
    sent = world.fake.requests[-1]
    assert counted.input_tokens == len(world.fake.render_prompt(sent)) > 0
    assert sent["tools"] == [CHAT_WEATHER] and sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert world.num_trajectories == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'image'"),
        ({"extra_body": {"container": "c"}}, "container"),
    ],
)
def test_what_could_not_be_answered_is_not_counted(claude: anthropic.Anthropic, more: dict, said: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=said):
        claude.messages.count_tokens(**{"model": "agent", "messages": HI} | more)


async def test_models_are_listed_page_by_page(world: PlayedWorld, claude: anthropic.Anthropic) -> None:
    for _ in range(3):
        await world.memory.policies.draft(system_prompt="Be brief.", parent=0)
    ids = [model.id for model in claude.models.list(limit=2)]  # the client requests all pages
    assert ids == ["agent", "agent@v0", "agent@v1", "agent@v2", "agent@v3"]
    before = claude.models.list(limit=2, before_id="agent@v3")
    assert [model.id for model in before.data] == ["agent@v1", "agent@v2"] and before.has_more
    one = claude.models.retrieve("agent@v3")
    assert (one.id, one.display_name, one.max_input_tokens) == ("agent@v3", "agent@v3 (draft)", 4096)
    with pytest.raises(anthropic.NotFoundError, match="'nobody' is no model"):
        claude.models.list(after_id="nobody")
