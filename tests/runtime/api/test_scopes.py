"""Memory that comes from one person is shown in that person's prompts only."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import structlog

from memory.records.insights import InsightOperation, OperationKind
from memory.schema import Feedback, Scope
from optimizer.insights.extraction import extract_insights
from runtime.errors import EngineLost
from serve import ModelCritic
from tests.optimizer.worlds import live
from tests.runtime.api.worlds import ServedWorld

SECRET = "My name is Jane Doe, my IBAN is DE89370400440532013000: confirm my refund."
HAIKU = "Write a haiku."


def ask(http: httpx.Client, text: str, **fields: Any) -> str:
    """Ask the agent; return the answer's id."""
    body = {"model": "agent", "messages": [{"role": "user", "content": text}], **fields}
    return http.post("/v1/chat/completions", json=body).raise_for_status().json()["id"]


def like(http: httpx.Client, answer: str, **fields: Any) -> None:
    http.post("/v1/feedback", json={"target": answer, "value": True, **fields}).raise_for_status()


def drain(world: ServedWorld) -> None:
    """Wait until the index is up to date."""
    asyncio.run(world.memory.index.drain())


def prompt(world: ServedWorld, http: httpx.Client, text: str, **fields: Any) -> str:
    """Ask; return the model's prompt without the question itself."""
    ask(http, text, **fields)
    (shown,) = [message["content"] for message in world.engine.calls[-1]["messages"] if message["role"] == "user"]
    return shown.removesuffix(text)


@pytest.mark.parametrize(
    ("jane", "others"),
    [
        ({"user": "jane"}, [{"user": "bob"}, {}]),
        ({"safety_identifier": "jane"}, [{"safety_identifier": "bob"}, {"user": "bob"}, {}]),
        ({"metadata": {"user": "jane"}}, [{"metadata": {"user": "bob"}}, {}]),
        ({}, [{"user": "bob"}, {}]),
    ],
)
def test_what_one_person_said_is_shown_to_nobody_else(
    world: ServedWorld, http: httpx.Client, jane: dict[str, Any], others: list[dict[str, Any]]
):
    like(http, ask(http, SECRET, **jane))
    drain(world)
    for other in others:
        for text in (HAIKU, SECRET):
            assert prompt(world, http, text, **other) == "", other
    assert ("IBAN" in prompt(world, http, SECRET, **jane)) == bool(jane)  # shown to her if she is identified
    assert prompt(world, http, HAIKU, **jane) == ""  # unrelated to the question


def test_a_row_knows_its_person_and_its_key_on_every_path(world: ServedWorld, http: httpx.Client):
    row, key = asyncio.run(world.memory.keys.create("shop", [Scope.INFER, Scope.FEEDBACK]))
    http.headers["Authorization"] = f"Bearer {key}"
    asked = ask(http, "hi", safety_identifier="jane", user="bob")
    said = {"model": "agent", "input": "hi", "user": "jane", "metadata": {"share": "true", "user": "bob"}}
    http.post("/v1/responses", json=said).raise_for_status()
    like(http, asked)
    like(http, asked, user="bob")
    first, second = world.memory.trajectories.get(asked), world.memory.trajectories.select(limit=1)[0].trajectory
    assert (first.user_id, first.key_id, first.is_shared) == ("jane", row.id, False)
    assert (second.user_id, second.key_id, second.is_shared) == ("jane", row.id, True)
    kept: list[Feedback] = world.memory.feedback.select(asked)
    assert [(it.user_id, it.key_id) for it in kept] == [("jane", row.id), ("bob", row.id)]
    listed = http.get("/v1/trajectories", params={"user": "jane"}).json()["data"]
    assert {it["id"] for it in listed} == {first.id, second.id}


@pytest.mark.parametrize("name", ["x" * 513, "a\x00b"])
def test_a_person_who_could_be_taken_for_another_is_refused(http: httpx.Client, name: str):
    said = {"model": "agent", "messages": [{"role": "user", "content": "hi"}], "user": name}
    refused = http.post("/v1/chat/completions", json=said)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "user")


def test_what_a_client_shares_is_shown_to_all_and_holds_nothing_of_one_person(world: ServedWorld, http: httpx.Client):
    like(http, ask(http, SECRET, user="jane"))
    drain(world)
    shared = {"user": "jane", "metadata": {"share": "true"}}
    assert prompt(world, http, SECRET, **shared) == ""  # else the shared episode would contain her text
    like(http, ask(http, "When is invoice 12 due?", **shared))
    drain(world)
    for person in ({}, {"user": "bob"}, {"user": "jane"}):
        assert "invoice 12" in prompt(world, http, "When is invoice 13 due?", **person)


def test_an_operator_widens_a_memory_rewords_it_and_retires_it(world: ServedWorld, http: httpx.Client):
    answer = ask(http, SECRET, user="jane")
    like(http, answer)
    drain(world)
    (pending,) = http.get("/v1/exemplars", params={"status": "pending"}).json()["data"]
    assert (pending["id"], pending["shown_to"], pending["user_id"]) == (answer, "user", "jane")
    assert "IBAN" in pending["text"]

    approved = http.post(f"/v1/exemplars/{answer}/approve", json={"text": "A customer asked. > refund"}).json()
    assert (approved["shown_to"], approved["text"]) == ("tenant", "A customer asked. > refund")
    drain(world)
    for person in ({}, {"user": "bob"}, {"user": "jane"}):
        shown = prompt(world, http, SECRET, **person)
        assert "A customer asked." in shown and "IBAN" not in shown

    for _ in range(2):
        assert http.post(f"/v1/exemplars/{answer}/retire").json()["shown_to"] == "nobody"
    assert prompt(world, http, SECRET, user="jane") == ""  # at once, before the index is updated
    refused = http.post(f"/v1/exemplars/{answer}/approve")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "illegal_move")
    assert [it["id"] for it in http.get("/v1/exemplars", params={"status": "retired"}).json()["data"]] == [answer]
    reviews = world.memory.reviews.of(answer, tenant="")
    assert [(it.kind.value, it.user_id, it.text) for it in reviews] == [
        ("approve", "jane", "A customer asked. > refund"),
        ("retire", "jane", None),
    ]


def test_an_operator_rewords_a_success_for_the_same_person(world: ServedWorld, http: httpx.Client):
    answer = ask(http, SECRET, user="jane")
    like(http, answer)
    drain(world)

    edited = http.post(f"/v1/exemplars/{answer}/edit", json={"text": "Jane asked for a refund. > refund"}).json()

    assert (edited["shown_to"], edited["user_id"], edited["text"]) == (
        "user",
        "jane",
        "Jane asked for a refund. > refund",
    )
    shown = prompt(world, http, SECRET, user="jane")
    assert "Jane asked for a refund." in shown and "IBAN" not in shown
    assert prompt(world, http, SECRET, user="bob") == ""
    assert http.post(f"/v1/exemplars/{answer}/edit", json={"text": " "}).status_code in (400, 422)
    (review,) = world.memory.reviews.of(answer, tenant="")
    assert (review.kind.value, review.text) == ("edit", "Jane asked for a refund. > refund")


def test_an_operator_decides_about_insights_and_the_key_is_recorded(world: ServedWorld, http: httpx.Client):
    key, token = asyncio.run(world.memory.keys.create("operator", [Scope.INFER, Scope.LEARN]))
    http.headers["Authorization"] = f"Bearer {token}"
    lesson = InsightOperation(OperationKind.ADD, "", "chat", "Jane is in a hurry", user_id="jane")
    asyncio.run(world.memory.insights.apply([lesson]))
    (row,) = http.get("/v1/insights", params={"status": "pending"}).json()["data"]
    assert (row["shown_to"], row["user_id"]) == ("user", "jane")
    assert "hurry" in prompt(world, http, HAIKU, user="jane")
    assert prompt(world, http, HAIKU, user="bob") == prompt(world, http, HAIKU) == ""

    edited = http.post(f"/v1/insights/{row['id']}/edit", json={"text": "answer briefly"}).json()
    assert (edited["shown_to"], edited["text"]) == ("user", "answer briefly")
    assert prompt(world, http, HAIKU, user="bob") == ""
    assert http.post(f"/v1/insights/{row['id']}/approve").json()["shown_to"] == "tenant"
    assert "answer briefly" in prompt(world, http, HAIKU, user="bob")
    assert http.post(f"/v1/insights/{row['id']}/retire").json()["shown_to"] == "nobody"
    assert prompt(world, http, HAIKU, user="jane") == ""
    decided = [(it.kind.value, it.key_id) for it in world.memory.reviews.of(row["id"], tenant="")]
    assert decided == [("edit", key.id), ("approve", key.id), ("retire", key.id)]


def test_a_conversation_never_finds_itself(world: ServedWorld, http: httpx.Client):
    like(http, ask(http, SECRET, user="jane", metadata={"episode_id": "ticket-1"}))
    drain(world)
    assert prompt(world, http, SECRET, user="jane", metadata={"episode_id": "ticket-1"}) == ""
    said = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "Done."}]
    again = [*said, {"role": "user", "content": SECRET}]
    http.post("/v1/chat/completions", json={"model": "agent", "messages": again, "user": "jane"}).raise_for_status()
    assert world.engine.calls[-1]["messages"][-1]["content"] == SECRET
    assert "IBAN" in prompt(world, http, SECRET, user="jane")  # another conversation does


def test_nobody_takes_up_what_another_person_began(world: ServedWorld, http: httpx.Client):
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    asked = [{"role": "user", "content": "How is Oslo?"}]
    body = {"model": "agent", "messages": asked, "tools": [weather], "user": "jane"}
    begun = http.post("/v1/chat/completions", json=body).json()
    reply = begun["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": reply["tool_calls"][0]["id"], "content": "rain"}
    for person, is_same in (("bob", False), ("jane", True)):
        body = {"model": "agent", "messages": [*asked, reply, result], "tools": [weather], "user": person}
        trajectory = http.post("/v1/chat/completions", json=body).headers["X-Trajectory-Id"]
        assert (trajectory == begun["id"]) == is_same, person


class Confused(Exception):
    """An unexpected error."""


def test_no_line_of_the_log_holds_what_a_person_said(
    world: ServedWorld, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    async def fail(*_: Any, **__: Any) -> Any:
        raise Confused(f"cannot read {SECRET!r}")

    said = {"model": "agent", "messages": [{"role": "user", "content": SECRET}]}
    with structlog.testing.capture_logs() as lines:
        monkeypatch.setattr(world.engine, "chat", fail)
        assert http.post("/v1/chat/completions", json=said).status_code == 502
        monkeypatch.setattr(world.memory.feedback, "post", fail)
        answer = world.memory.trajectories.select(limit=1)[0].trajectory.id
        assert http.post("/v1/feedback", json={"target": answer, "value": True}).status_code == 500
    events = [(line["event"], line["error"]) for line in lines]
    assert events == [("episode failed", "Confused"), ("request failed", "Confused")]
    assert "Jane" not in repr(lines) and "post_feedback" in lines[1]["trace"]


async def test_what_an_engine_says_of_a_prompt_is_in_no_report_and_in_no_log():
    class Quoting:
        async def complete(self, *_: Any, **__: Any) -> str:
            raise EngineLost("the engine answered 500", quoted=f"cannot parse {SECRET!r}")

    with structlog.testing.capture_logs() as lines:
        won = live([("take carrot", "Taken.")], task="1")
        lost = live([("drop carrot", "Dropped.")], task="1", is_success=False)
        extraction = await extract_insights([won], [lost], known=[], complete=ModelCritic(Quoting()).complete)

    assert extraction.first_failure == "CompletionError: the engine answered 500"
    assert "Jane" not in repr(lines) and lines[0]["event"] == "critique failed"
