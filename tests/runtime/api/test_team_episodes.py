"""A team behind the HTTP APIs: the client's view, the record, and the training rows from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from memory.datasets.exports import ExportContent, ExportQuery
from memory.records.exemplars import render_exemplar
from memory.team import read_by_client
from optimizer.config import DemonstrationConfig
from optimizer.data.demonstrations import build_demonstrations
from optimizer.rewards import grade
from runtime.agent.team import CHECKER_PROMPT, PLANNER_PROMPT
from runtime.config import AgentConfig
from tests.runtime.api.playing import FORGETFUL, PlayedWorld
from tests.runtime.fake_engine import Reply

ASKED = {"role": "user", "content": "How is Oslo?"}
TEXTS = ("Look out of the window.", "Dry.", "REVISE: it rains", "Wet.")
ROLES = ("planner", "actor", "checker", "checker", "actor")


def script(request: dict[str, Any]) -> Reply:
    match request["messages"][0]["content"]:
        case prompt if prompt == PLANNER_PROMPT:
            return Reply(TEXTS[0])
        case prompt if prompt == CHECKER_PROMPT:
            return Reply(TEXTS[2])
    is_sent_back = "it rains" in request["messages"][-1]["content"]
    return Reply(TEXTS[3] if is_sent_back else TEXTS[1])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlayedWorld]:
    config = AgentConfig.model_validate({"max_steps": 8, "team": ["planner", "actor", "checker"]})
    with PlayedWorld(tmp_path_factory.mktemp("data"), script, config=config, memory_config=FORGETFUL) as world:
        yield world


@pytest.fixture
def world(shared: PlayedWorld) -> PlayedWorld:
    shared.begin_anew()
    shared.fake.script = script
    return shared


@pytest.fixture
def client(world: PlayedWorld) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(world: PlayedWorld) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=world.url, trust_env=False, timeout=30) as http:
        yield http


def test_a_client_gets_the_answer_that_stands_whole_and_streamed(world: PlayedWorld, client: openai.OpenAI):
    answer = client.chat.completions.create(model="agent", messages=[ASKED])
    chunks = list(
        client.chat.completions.create(
            model="agent", messages=[ASKED], stream=True, stream_options={"include_usage": True}
        )
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason, streamed) == ("Wet.", "stop", "Wet.")
    assert answer.usage.completion_tokens == sum(map(len, TEXTS)) == chunks[-1].usage.completion_tokens


def test_the_responses_api_streams_the_answer_that_stands(world: PlayedWorld, client: openai.OpenAI):
    events = list(client.responses.create(model="agent", input="How is Oslo?", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Wet."
    assert events[-1].response.output_text == "Wet."


def test_messages_stream_the_answer_that_stands(world: PlayedWorld, http: httpx.Client):
    body = {"model": "agent", "max_tokens": 50, "messages": [ASKED], "stream": True}
    lines = http.post("/v1/messages", json=body).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == "Wet."


def test_the_record_shows_the_role_of_each_step(world: PlayedWorld, client: openai.OpenAI, http: httpx.Client):
    answer = client.chat.completions.create(model="agent", messages=[ASKED])
    steps = http.get(f"/v1/trajectories/{answer.id}").json()["steps"]
    assert tuple(step["role"] for step in steps) == ROLES
    assert [step["kind"] for step in steps] == ["model", "model", "model", "user", "model"]


def test_an_export_has_the_actors_conversation_with_the_plan_and_the_team_beside_it(
    world: PlayedWorld, client: openai.OpenAI
):
    answer = client.chat.completions.create(model="agent", messages=[ASKED])
    query = ExportQuery(ExportContent.TRAJECTORIES)
    rows = {row.cursor: row.contents[0] for page in world.memory.exports.read(query) for row in page}
    row = rows[answer.id]
    assert "Look out of the window." in row.prompt[-1]["content"]
    assert [(each["role"], each["content"]) for each in row.completion][::2] == [
        ("assistant", "Dry."),
        ("assistant", "Wet."),
    ]
    team = row.extra["team"]
    assert tuple(each["role"] for each in team) == ROLES
    assert [each["content"] for each in team if each["role"] != "actor"][:2] == [TEXTS[0], TEXTS[2]]


def test_a_thumb_and_a_correction_are_about_the_answer_that_stands(
    world: PlayedWorld, client: openai.OpenAI, http: httpx.Client
):
    answer = client.chat.completions.create(model="agent", messages=[ASKED])
    refused = http.post("/v1/feedback", json={"target": answer.id, "step": 0, "correction": "No plan."})
    assert refused.status_code == 400 and "is a planner's: correct a reply of the model" in refused.text
    assert http.post("/v1/feedback", json={"target": answer.id, "correction": "Very wet."}).is_success
    (correction,) = [it for it in world.memory.feedback.corrections(limit=9) if it.trajectory.id == answer.id]
    assert correction.step.content == "Wet."
    query = ExportQuery(ExportContent.PREFERENCES)
    (row,) = [it for page in world.memory.exports.read(query) for each in page for it in each.contents]
    assert (row.completion[0]["content"], row.rejected[0]["content"]) == ("Very wet.", "Wet.")
    assert [message["content"] for message in row.prompt[1:2]] == ["Dry."]


def test_each_role_learns_its_own_tokens_once(world: PlayedWorld, client: openai.OpenAI, http: httpx.Client):
    answer = client.chat.completions.create(model="agent", messages=[ASKED])
    http.post("/v1/feedback", json={"target": answer.id, "value": True})
    graded = [each for each in grade(world.memory) if each.trajectory.id == answer.id]
    built = build_demonstrations(graded, None, config=DemonstrationConfig(), max_length_tokens=20_000)
    texts = ["".join(chr(it) for it, own in zip(row.input_ids, row.mask, strict=True) if own) for row in built.rows]
    assert sorted(texts) == sorted([TEXTS[0], TEXTS[1] + TEXTS[3], TEXTS[2]])


def test_an_exemplar_shows_neither_plan_nor_check_nor_the_answer_that_was_sent_back(
    world: PlayedWorld, client: openai.OpenAI
):
    answer = client.chat.completions.create(model="agent", messages=[ASKED])
    steps = world.memory.trajectories.steps(answer.id)
    assert render_exemplar("How is Oslo?", read_by_client(steps)) == "How is Oslo?\nWet."
