"""Tools that the client runs: its requests become one trajectory, even if the client or the server stops in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from memory.schema import Split, Step, StepKind, TrajectoryStage, Trust
from optimizer.config import DemonstrationConfig, PreferenceConfig
from optimizer.data.demonstrations import build_demonstrations
from optimizer.data.preferences import build_preferences
from optimizer.data.stitching import render_prompt, stitch
from optimizer.rewards import grade
from runtime.agent.open_episodes import OpenEpisodes
from runtime.engine.model_families import POCKET_MODEL
from runtime.tools.functions import tool_from_function
from tests.runtime.api.playing import WEATHER, PlayedWorld, forecast
from tests.runtime.fake_engine import Reply, call, ids_of
from tests.support.waiting import eventually

ASKED = {"role": "user", "content": "How is Oslo?"}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PlayedWorld]:
    with PlayedWorld(tmp_path / "data") as world:
        yield world


def ask(client: openai.OpenAI, messages: list[Any], **more: Any):
    return client.chat.completions.create(model="agent", messages=messages, **{"tools": [WEATHER]} | more)


def results(answer: Any, *texts: str) -> list[dict[str, Any]]:
    """Return the reply as a client sends it back, and the results of its tools."""
    message = answer.choices[0].message
    calls = zip(message.tool_calls, texts, strict=True)
    return [message.model_dump(), *({"role": "tool", "tool_call_id": call.id, "content": it} for call, it in calls)]


@pytest.mark.parametrize("named", ["weather", "mail, weather", "mail", ""])
def test_the_client_names_tools_that_return_what_others_wrote(
    world: PlayedWorld, client: openai.OpenAI, named: str
) -> None:
    metadata = {"untrusted_tools": named}
    expected = Trust.UNTRUSTED if "weather" in named else Trust.TRUSTED
    first = ask(client, [ASKED], metadata=metadata)
    assert world.newest.trust is Trust.TRUSTED
    ask(client, [ASKED, *results(first, "rain")], metadata=metadata)
    assert (world.newest.id, world.newest.trust) == (first.id, expected)
    # a conversation that was begun elsewhere and holds such a result
    elsewhere = [{"role": "user", "content": "How is Rome?"}, *results(first, "sun"), ASKED]
    opened = ask(client, elsewhere, metadata=metadata)
    assert (world.newest.id, world.newest.trust) == (opened.id, expected)
    # two calls of one reply may have the same id
    functions = [{"name": name, "arguments": "{}"} for name in ("weather", "calendar")]
    calls = [{"id": "c", "type": "function", "function": function} for function in functions]
    told = [{"role": "tool", "tool_call_id": "c", "content": text} for text in ("sun", "Monday")]
    ask(client, [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}, *told, ASKED], metadata=metadata)
    assert world.newest.trust is expected


def test_a_tool_that_is_named_after_its_result_came_is_distrusted_too(
    world: PlayedWorld, client: openai.OpenAI
) -> None:
    first = ask(client, [ASKED])
    heard = [ASKED, *results(first, "twice")]
    world.fake.script = lambda request: call("weather", city="Oslo")
    second = ask(client, heard)
    world.fake.script = forecast
    assert second.choices[0].finish_reason == "tool_calls" and world.newest.trust is Trust.TRUSTED
    ask(client, [*heard, *results(second, "rain")], metadata={"untrusted_tools": "weather"})
    assert (world.newest.id, world.newest.trust) == (first.id, Trust.UNTRUSTED)


def test_the_turns_are_one_trajectory_closed_by_the_final_answer(world: PlayedWorld, client: openai.OpenAI) -> None:
    first = ask(client, [ASKED])
    assert first.choices[0].finish_reason == "tool_calls"
    assert world.memory.trajectories.get(first.id).stage is TrajectoryStage.RUNNING
    last = ask(client, [ASKED, *results(first, "rain")])
    assert last.choices[0].message.content == "Heard: rain"
    assert last.id == f"{first.id}.1"
    trajectory = world.newest
    assert (trajectory.id, trajectory.stage, trajectory.answer) == (first.id, TrajectoryStage.FINISHED, "Heard: rain")
    steps = world.memory.trajectories.steps(first.id)
    assert [step.kind for step in steps] == [StepKind.MODEL, StepKind.TOOL, StepKind.MODEL]
    assert (steps[1].tool_name, steps[1].content) == ("weather", "rain")
    assert world.num_trajectories == 1
    assert first.usage.completion_tokens + last.usage.completion_tokens == trajectory.output_tokens


def test_parallel_calls_come_back_together_and_in_any_order(world: PlayedWorld, client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "How are Oslo and Rome?"}]
    first = ask(client, messages)
    assert len(first.choices[0].message.tool_calls) == 2
    reply, oslo, rome = results(first, "rain", "sun")
    with pytest.raises(openai.BadRequestError, match="'call-1' has no result"):
        ask(client, [*messages, reply, oslo])
    assert ask(client, [*messages, reply, rome, oslo]).choices[0].message.content == "Heard: sun, rain"
    assert world.num_trajectories == 1


def test_a_stream_can_be_gone_on_with_like_any_answer(world: PlayedWorld, client: openai.OpenAI) -> None:
    chunks = list(ask(client, [ASKED], stream=True, stream_options={"include_usage": True}))
    pieces = [piece for chunk in chunks if chunk.choices for piece in chunk.choices[0].delta.tool_calls or []]
    assert (pieces[0].id, pieces[0].function.name) == ("call-0", "weather")
    assert len(pieces) > 1 and "".join(it.function.arguments or "" for it in pieces) == '{"city": "Oslo"}'
    assert chunks[-2].choices[0].finish_reason == "tool_calls" and chunks[-1].usage.completion_tokens > 0
    function = {"name": "weather", "arguments": '{ "city":"Oslo" }'}  # serialised differently
    reply = {"role": "assistant", "tool_calls": [{"id": "call-0", "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": "call-0", "content": [{"type": "text", "text": "rain"}]}
    chunks = list(ask(client, [ASKED, reply, result], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Heard: rain"
    assert world.num_trajectories == 1


async def test_memory_is_retrieved_once_and_the_policy_stays_pinned(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client
) -> None:
    await world.memory.policies.draft(system_prompt="Be brief.", parent=0)
    http.post("/v1/policies/v1/promote")
    first = ask(client, [ASKED])
    assert first.model == "agent@v1"
    http.post("/v1/policies/rollback")
    http.post("/v1/documents", json={"title": "Oslo", "text": "How is Oslo? It rains in Oslo."})
    await world.memory.index.drain()
    last = ask(client, [ASKED, *results(first, "rain")])
    assert last.model == "agent@v1"
    assert world.fake.requests[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert world.newest.memory_text == ""
    assert ask(client, [ASKED]).model == "agent@v0"
    assert "It rains in Oslo." in world.newest.memory_text


async def test_another_pin_begins_another_trajectory(world: PlayedWorld, client: openai.OpenAI) -> None:
    await world.memory.policies.draft(system_prompt="Be brief.", parent=0)
    first = ask(client, [ASKED])
    follow = {"messages": [ASKED, *results(first, "rain")], "tools": [WEATHER]}
    other = client.chat.completions.create(model="agent@v1", **follow)
    assert (other.model, world.num_trajectories) == ("agent@v1", 2)
    same = client.chat.completions.create(model="agent@v0", **follow)
    assert (same.id, world.num_trajectories) == (f"{first.id}.1", 2)


def test_what_the_user_adds_to_the_results_is_kept(world: PlayedWorld, client: openai.OpenAI) -> None:
    first = ask(client, [ASKED])
    ask(client, [ASKED, *results(first, "rain"), {"role": "user", "content": "Be quick."}])
    steps = world.memory.trajectories.steps(world.newest.id)
    assert [(step.kind, step.content) for step in steps[1:3]] == [(StepKind.TOOL, "rain"), (StepKind.USER, "Be quick.")]
    assert world.fake.requests[-1]["messages"][-1] == {"role": "user", "content": "Be quick."}


@pytest.mark.parametrize("metadata", [None, {"episode_id": "mine"}])
def test_edited_history_begins_a_new_trajectory(world: PlayedWorld, client: openai.OpenAI, metadata) -> None:
    first = ask(client, [ASKED], metadata=metadata)
    edited = {"role": "user", "content": "How is Oslo, really?"}
    last = ask(client, [edited, *results(first, "rain")], metadata=metadata)
    assert last.choices[0].message.content == "Heard: rain"
    assert not last.id.startswith(first.id)
    assert world.memory.trajectories.get(first.id).stage is TrajectoryStage.RUNNING


def test_an_episode_id_keeps_twins_apart(world: PlayedWorld, client: openai.OpenAI) -> None:
    first = [ask(client, [ASKED], metadata={"episode_id": name}) for name in ("one", "two")]
    ask(client, [ASKED, *results(first[1], "sun")], metadata={"episode_id": "two"})
    assert world.memory.trajectories.get(first[0].id).stage is TrajectoryStage.RUNNING
    assert world.memory.trajectories.get(first[1].id).answer == "Heard: sun"


@pytest.mark.parametrize("by", ["trajectory", "first answer", "last answer", "episode"])
def test_feedback_on_any_answer_reaches_the_trajectory(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client, by: str
) -> None:
    metadata = {"episode_id": "mine"}
    first = ask(client, [ASKED], metadata=metadata)
    last = ask(client, [ASKED, *results(first, "rain")], metadata=metadata)
    target = {"trajectory": world.newest.id, "first answer": first.id, "last answer": last.id}.get(by)
    body = {"episode_id": "mine"} if target is None else {"target": target}
    assert http.post("/v1/feedback", json=body | {"value": True}).json()["trajectory_id"] == world.newest.id
    assert world.memory.trajectories.effective_reward(world.newest.id) == 1.0
    assert http.get(f"/v1/trajectories/{last.id}").json()["id"] == world.newest.id


async def test_a_second_request_for_an_episode_is_refused_while_the_first_is_answered(world: PlayedWorld) -> None:
    goes_on = asyncio.Event()

    async def script(request: dict[str, Any]) -> Reply:
        if any(message["role"] == "tool" for message in request["messages"]):
            while not goes_on.is_set():
                await asyncio.sleep(0.01)
        return forecast(request)

    world.fake.script = script
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:

        def create(messages: list[Any], **more: Any):
            return client.chat.completions.create(model="agent", messages=messages, tools=[WEATHER], **more)

        first = await create([ASKED], metadata={"episode_id": "mine"})
        messages = [ASKED, *results(first, "rain")]
        going = asyncio.ensure_future(create(messages))
        while len(world.fake.requests) < 2:
            await asyncio.sleep(0.01)
        for more in ({}, {"metadata": {"episode_id": "mine"}}):
            with pytest.raises(openai.ConflictError, match="another request") as refused:
                await create(messages, **more)
            assert refused.value.code == "episode_busy"
        goes_on.set()
        assert (await going).choices[0].message.content == "Heard: rain"
    assert world.num_trajectories == 1


async def test_a_client_that_never_comes_back_has_its_trajectory_closed(
    world: PlayedWorld, client: openai.OpenAI
) -> None:
    first = ask(client, [ASKED])
    assert await OpenEpisodes(world.memory, idle_seconds=60).sweep() == 0
    assert await OpenEpisodes(world.memory, idle_seconds=0).sweep() == 1
    closed = world.memory.trajectories.get(first.id)
    assert closed.stage is TrajectoryStage.FINISHED and closed.error.startswith("Idle: ")
    last = ask(client, [ASKED, *results(first, "rain")])
    assert last.choices[0].message.content == "Heard: rain" and world.num_trajectories == 2


def test_a_client_that_is_done_closes_its_trajectory(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client
) -> None:
    first = ask(client, [ASKED])
    closed = http.post(f"/v1/trajectories/{first.id}/close").json()
    assert (closed["stage"], closed["error"], closed["num_steps"]) == ("finished", None, 1)
    assert http.post(f"/v1/trajectories/{first.id}/close").json() == closed
    assert http.post("/v1/trajectories/trj_0/close").status_code == 404


def test_a_restarted_server_goes_on_where_the_client_was_left(tmp_path: Path) -> None:
    with PlayedWorld(tmp_path / "data") as world, openai.OpenAI(base_url=f"{world.url}/v1", api_key="none") as client:
        first = ask(client, [ASKED])
        messages = [ASKED, *results(first, "rain")]
    with PlayedWorld(tmp_path / "data") as world, openai.OpenAI(base_url=f"{world.url}/v1", api_key="none") as client:
        assert world.memory.trajectories.get(first.id).stage is TrajectoryStage.RUNNING
        assert ask(client, messages).id == f"{first.id}.1"
        assert world.memory.trajectories.get(first.id).answer == "Heard: rain"


async def test_a_turn_cut_off_by_a_crash_is_taken_up_without_repeating_what_is_recorded(
    world: PlayedWorld, client: openai.OpenAI
) -> None:
    first = ask(client, [ASKED])
    trajectory = world.newest
    step = Step(  # written before the process died
        trajectory_id=first.id,
        position=1,
        kind=StepKind.TOOL,
        content="rain",
        tool_name="weather",
        tool_call_id="call-0",
    )
    await world.memory.trajectories.append(step, trajectory=trajectory)
    assert await world.memory.trajectories.close_orphans() == 0
    ask(client, [ASKED, *results(first, "rain")])
    assert [step.content for step in world.memory.trajectories.steps(first.id)][1:] == ["rain", "Heard: rain"]


def test_a_failed_turn_closes_the_trajectory_and_a_retry_opens_another(
    world: PlayedWorld, client: openai.OpenAI
) -> None:
    first = ask(client, [ASKED])
    messages = [ASKED, *results(first, "rain")]
    world.fake.script = lambda request: Reply(status=500, error="out of luck")
    with pytest.raises(openai.InternalServerError):
        ask(client, messages)
    assert world.memory.trajectories.get(first.id).stage is TrajectoryStage.FAILED
    world.fake.script = forecast
    assert ask(client, messages).choices[0].message.content == "Heard: rain"


def test_tools_of_both_sides_can_be_called_at_once(tmp_path: Path) -> None:
    def clock() -> str:
        """Say the time."""
        return "noon"

    def script(request: dict[str, Any]) -> Reply:
        if request["messages"][-1]["role"] != "user":
            return forecast(request)
        return Reply(calls=[*call("clock").calls, *call("weather", city="Oslo").calls])

    tools = [tool_from_function(clock)]
    with PlayedWorld(tmp_path / "data", script, tools=tools) as world:
        client = openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0)
        for stream in (False, True):
            if stream:
                chunks = list(ask(client, [ASKED], stream=True))
                pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
                assert {piece.index for piece in pieces} == {0}
                call_id, name = pieces[0].id, pieces[0].function.name
            else:
                (made,) = ask(client, [ASKED]).choices[0].message.tool_calls
                call_id, name = made.id, made.function.name
            assert name == "weather"
            function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
            reply = {"role": "assistant", "tool_calls": [{"id": call_id, "type": "function", "function": function}]}
            result = {"role": "tool", "tool_call_id": call_id, "content": "rain"}
            assert ask(client, [ASKED, reply, result]).choices[0].message.content == "Heard: noon, rain"
            steps = world.memory.trajectories.steps(world.newest.id)
            assert [step.kind for step in steps] == ["model", "tool", "tool", "model"]
        assert world.num_trajectories == 2
        client.close()


async def test_the_optimizer_learns_from_it_token_by_token(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client
) -> None:
    first = ask(client, [ASKED])
    last = ask(client, [ASKED, *results(first, "rain")])
    http.post("/v1/feedback", json={"target": last.id, "value": True})
    (graded,) = grade(world.memory)
    (row,), joints = stitch(graded.steps)
    assert joints == {"clean": 1}
    said = [token for token, own in zip(row.input_ids, row.mask, strict=True) if own]
    assert said == ids_of('weather{"city": "Oslo"}' + "Heard: rain")
    assert "<tool>rain<assistant>" in "".join(map(chr, row.input_ids))
    built = build_demonstrations([graded], None, config=DemonstrationConfig(), max_length_tokens=1000)
    assert [demonstration.trajectory_id for demonstration in built.rows] == [first.id]


async def test_two_tries_at_one_request_become_a_preference(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client
) -> None:
    cities = iter(("Oslo", "Rome"))

    def script(request: dict[str, Any]) -> Reply:
        if request["messages"][-1]["role"] == "user":
            return call("weather", city=next(cities))
        return forecast(request)

    world.fake.script = script
    for value in (True, False):
        first = ask(client, [ASKED], metadata={"episode_id": f"try {value}"})
        ask(client, [ASKED, *results(first, "rain")], metadata={"episode_id": f"try {value}"})
        http.post("/v1/feedback", json={"episode_id": f"try {value}", "value": value})
    built = build_preferences(grade(world.memory), None, config=PreferenceConfig(), max_length_tokens=1000)
    (row,) = built.rows
    assert "".join(map(chr, row.prompt_ids)) == "<user>How is Oslo?<assistant>"
    assert "".join(map(chr, row.chosen_ids)).startswith('weather{"city": "Oslo"}')
    assert "".join(map(chr, row.rejected_ids)).startswith('weather{"city": "Rome"}')


async def test_the_memory_segment_is_taken_out_of_it_as_the_real_template_has_it(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client
) -> None:
    from transformers import AutoTokenizer  # slow: imported only here

    tokenizer = AutoTokenizer.from_pretrained(POCKET_MODEL)
    calling = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    telling = "Heard: rain<|im_end|>"

    def script(request: dict[str, Any]) -> Reply:
        reply = forecast(request)
        text = calling if reply.calls else telling
        return replace(reply, output_ids=tokenizer(text, add_special_tokens=False)["input_ids"])

    world.fake.script = script
    world.fake.render_prompt = lambda body: render_prompt(tokenizer, body["messages"], body["tools"])
    http.post("/v1/documents", json={"title": "Oslo", "text": "How is Oslo? It rains in Oslo."})
    await world.memory.index.drain()
    last = ask(client, [ASKED, *results(ask(client, [ASKED]), "rain")])
    assert "It rains in Oslo." in world.newest.memory_text
    http.post("/v1/feedback", json={"target": last.id, "value": True})

    config = DemonstrationConfig(keep_memory_share=0.0)
    built = build_demonstrations(grade(world.memory), tokenizer, config=config, max_length_tokens=4000)
    (row,) = built.rows
    assert built.counts["clean"] == 1 and not row.has_memory
    whole = tokenizer.decode(row.input_ids)
    assert "It rains" not in whole and "<tool_response>\nrain\n</tool_response>" in whole
    said = [token for token, own in zip(row.input_ids, row.mask, strict=True) if own]
    assert tokenizer.decode(said) == calling + telling


HELD_OUT = {"task": "oslo", "split": "held-out"}


def test_a_client_names_its_task_and_says_that_it_only_measures(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client
) -> None:
    first = ask(client, [ASKED], metadata=HELD_OUT)
    last = ask(client, [ASKED, *results(first, "rain")], metadata=HELD_OUT)
    http.post("/v1/feedback", json={"target": last.id, "value": True})
    trajectory = world.newest
    assert (trajectory.environment, trajectory.task, trajectory.split) == (None, "oslo", Split.HELD_OUT)
    assert world.memory.trajectories.with_reward(trajectory).is_success and world.num_trajectories == 1
    assert grade(world.memory) == []
    with world.memory.database.read() as session:
        assert session.exec(world.memory.trajectories.exemplary()).all() == []


def test_a_try_that_measures_is_never_taken_for_one_that_teaches(world: PlayedWorld, client: openai.OpenAI) -> None:
    teaches, measures = ask(client, [ASKED]), ask(client, [ASKED], metadata=HELD_OUT)
    last = ask(client, [ASKED, *results(measures, "rain")], metadata=HELD_OUT)
    assert last.id.startswith(measures.id)
    assert world.memory.trajectories.get(teaches.id).stage is TrajectoryStage.RUNNING


@pytest.mark.parametrize("metadata", [{"split": "held-out"}, {"split": "held-out", "task": ""}])
def test_a_split_without_a_task_is_refused(client: openai.OpenAI, metadata: dict[str, str]) -> None:
    with pytest.raises(openai.BadRequestError, match=r"metadata\.task is missing") as refused:
        ask(client, [ASKED], metadata=metadata)
    assert refused.value.param == "metadata.task"


def test_what_an_episode_was_opened_as_holds_for_all_its_turns(tmp_path: Path) -> None:
    orders: list[str] = []

    def order(article: str) -> str:
        """Buy something."""
        orders.append(article)
        return "bought"

    def script(request: dict[str, Any]) -> Reply:
        last = request["messages"][-1]
        if last["role"] == "user":
            return call("weather", city="Oslo")
        return call("order", article="umbrella") if last["content"] == "rain" else Reply(f"Heard: {last['content']}")

    with PlayedWorld(tmp_path / "data", script, tools=[tool_from_function(order, has_side_effects=True)]) as world:
        client = openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0)
        first = ask(client, [ASKED], metadata=HELD_OUT)
        last = ask(client, [ASKED, *results(first, "rain")])  # a later turn need not repeat it
        assert "not available here" in last.choices[0].message.content
        client.close()
    assert orders == []


async def test_with_memory_shown_the_prompt_grows_from_the_same_beginning(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client
) -> None:
    http.post("/v1/documents", json={"title": "Oslo", "text": "How is Oslo? It rains in Oslo."})
    await world.memory.index.drain()
    first = ask(client, [ASKED])
    assert "It rains in Oslo." in world.newest.memory_text
    ask(client, [ASKED, *results(first, "rain")])
    one, two = world.fake.requests
    assert two["messages"][: len(one["messages"])] == one["messages"]
    _, joints = stitch(world.memory.trajectories.steps(first.id))
    assert joints == {"clean": 1}


async def test_a_client_that_leaves_while_its_results_are_read_cancels_the_episode(world: PlayedWorld) -> None:
    async def script(request: dict[str, Any]) -> Reply:
        if any(message["role"] == "tool" for message in request["messages"]):
            await asyncio.sleep(3600)
        return forecast(request)

    world.fake.script = script
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        first = await client.chat.completions.create(model="agent", messages=[ASKED], tools=[WEATHER])
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(
                model="agent", messages=[ASKED, *results(first, "rain")], tools=[WEATHER], timeout=0.5
            )
    assert eventually(lambda: world.memory.trajectories.get(first.id).stage is TrajectoryStage.CANCELLED)


def test_tools_that_the_template_would_drop_are_refused_by_name(world: PlayedWorld, http: httpx.Client) -> None:
    hello = {"model": "agent", "messages": [{"role": "user", "content": "hi"}]}
    function = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
    world.services.engine.takes_tools = False
    try:
        chat = http.post("/v1/chat/completions", json={**hello, "tools": [WEATHER]})
        response = http.post("/v1/responses", json={"model": "agent", "input": "hi", "tools": [function]})
        plain = http.post("/v1/chat/completions", json=hello)
    finally:
        world.services.engine.takes_tools = True
    for answer in (chat, response):
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
        assert "--chat-template" in answer.json()["error"]["message"]
    assert plain.status_code == 200
