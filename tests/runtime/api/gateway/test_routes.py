"""All other routes: answers and errors."""

from __future__ import annotations

import httpx
import pytest

from memory.errors import StorageError
from memory.records.insights import InsightOperation, OperationKind
from memory.schema import RewardSource
from runtime.doctor import HealthCheck
from runtime.maintenance import Maintenance
from tests.runtime.api.worlds import ServedWorld
from tests.support.waiting import eventually


def ask(http: httpx.Client, text: str = "hello", **metadata: str) -> str:
    """Send a chat request; return the trajectory's id."""
    body = {"model": "agent", "messages": [{"role": "user", "content": text}], "metadata": metadata}
    return http.post("/v1/chat/completions", json=body).json()["id"]


def play(http: httpx.Client, task: str) -> str:
    return ask(http, "play", environment="doors", task=task)


# feedback


def test_feedback_becomes_a_reward_once(world: ServedWorld, http: httpx.Client) -> None:
    trajectory_id = ask(http)
    body = {"target": trajectory_id, "value": True, "comment": "nice", "id": "mine-1"}
    first, second = http.post("/v1/feedback", json=body), http.post("/v1/feedback", json=body)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == {"feedback_id": "mine-1", "trajectory_id": trajectory_id, "is_new": True}
    assert second.json()["is_new"] is False
    rewards = world.memory.trajectories.rewards(trajectory_id)
    assert [(reward.value, reward.source) for reward in rewards] == [(1.0, RewardSource.USER)]


def test_the_same_feedback_id_with_another_body_is_a_conflict(http: httpx.Client) -> None:
    body = {"target": ask(http), "value": True, "id": "mine-2"}
    http.post("/v1/feedback", json=body)
    answer = http.post("/v1/feedback", json=body | {"value": False})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "feedback_conflict"


@pytest.mark.parametrize("by", ["target", "inference_id", "episode_id"])
def test_an_episode_is_named_in_three_ways(http: httpx.Client, by: str) -> None:
    trajectory_id = ask(http, episode_id="episode-1")
    name = "episode-1" if by == "episode_id" else trajectory_id
    answer = http.post("/v1/feedback", json={by: name, "value": 0.5})
    assert answer.json()["trajectory_id"] == trajectory_id


@pytest.mark.parametrize("by", ["target", "inference_id", "episode_id"])
def test_feedback_for_an_unknown_id_is_not_found(http: httpx.Client, by: str) -> None:
    answer = http.post("/v1/feedback", json={by: "nobody", "value": 1.0})
    assert answer.status_code == 404
    assert "'nobody'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"value": 7}, "from 0 to 1, not 7"),
        ({}, "the feedback is empty"),
        ({"value": 1, "episode_id": "too"}, "exactly one of"),
        ({"value": 1, "colour": "red"}, "colour"),
    ],
)
def test_feedback_that_cannot_be_is_refused(http: httpx.Client, more: dict, said: str) -> None:
    answer = http.post("/v1/feedback", json={"target": ask(http)} | more)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("value", "reward"), [("thumbs_up", 1.0), ("Thumbs-Down", 0.0), ("good", 1.0), ("\N{THUMBS DOWN SIGN}", 0.0)]
)
def test_a_word_for_a_reward_counts_as_one(world: ServedWorld, http: httpx.Client, value: str, reward: float) -> None:
    body = {"target": ask(http), "value": value, "id": "mine-3"}
    assert http.post("/v1/feedback", json=body).status_code == 201
    assert http.post("/v1/feedback", json=body).status_code == 200  # the same again
    assert world.memory.trajectories.effective_reward(body["target"]) == reward


def test_a_word_that_means_no_reward_is_refused_with_those_that_do(world: ServedWorld, http: httpx.Client) -> None:
    target = ask(http)
    answer = http.post("/v1/feedback", json={"target": target, "value": "thumbs_sideways"})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert "'thumbs_sideways'" in message and "'thumbs_up'" in message and "from 0 to 1" in message
    assert world.memory.feedback.select(target) == []


def test_words_are_kept_and_shown_but_are_no_reward(world: ServedWorld, http: httpx.Client) -> None:
    trajectory_id = ask(http)
    http.post("/v1/feedback", json={"target": trajectory_id, "name": "tone", "value": "rude", "correction": "Hello!"})
    shown = http.get(f"/v1/trajectories/{trajectory_id}").json()["feedback"]
    assert [(said["name"], said["value"], said["correction"]) for said in shown] == [("tone", "rude", "Hello!")]
    assert world.memory.trajectories.rewards(trajectory_id) == []


# trajectories


def test_a_trajectory_is_read_step_by_step(http: httpx.Client) -> None:
    one = http.get(f"/v1/trajectories/{play(http, '52')}").json()
    assert [step["kind"] for step in one["steps"]] == ["model", "tool"]
    assert (one["steps"][0]["num_prompt_tokens"], one["steps"][0]["prompt_token_ids"]) == (10, None)
    assert (one["rewards"][0]["value"], one["rewards"][0]["reason"]) == (1.0, "opened left")


def test_token_ids_come_where_asked_for(http: httpx.Client) -> None:
    one = http.get(f"/v1/trajectories/{play(http, '52')}", params={"token_ids": True}).json()
    assert one["steps"][0]["output_token_ids"] == [2, 2, 2]


def test_trajectories_are_listed_newest_first_and_page_by_page(http: httpx.Client) -> None:
    ids = [play(http, str(task)) for task in (52, 53, 54)]
    page = http.get("/v1/trajectories", params={"limit": 2}).json()
    assert [one["id"] for one in page["data"]] == ids[:0:-1]
    rest = http.get("/v1/trajectories", params={"before": page["next_before"]}).json()
    assert [one["id"] for one in rest["data"]] == ids[:1] and rest["next_before"] is None
    lost = http.get("/v1/trajectories", params={"success": False}).json()
    assert [one["id"] for one in lost["data"]] == [ids[1]]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/trajectories/nobody", 404),
        ("/v1/trajectories?policy=v9", 404),
        ("/v1/trajectories?split=dreams", 400),
        ("/v1/trajectories?limit=0", 400),
        ("/v1/policies/v9", 404),
        ("/v1/policies/latest", 404),
        ("/v1/cycles/nobody", 404),
        ("/v1/cycles/nobody/report", 404),
        ("/v1/environments/chess/tasks", 404),
        ("/v1/nowhere", 404),
    ],
)
def test_what_is_not_there_is_named_in_openai_s_shape(http: httpx.Client, path: str, status: int) -> None:
    answer = http.get(path)
    assert answer.status_code == status
    assert {"message", "type", "param", "code"} <= set(answer.json()["error"])


def test_the_wrong_method_is_refused_in_the_same_shape(http: httpx.Client) -> None:
    answer = http.get("/v1/chat/completions")
    assert answer.status_code == 405 and answer.json()["error"]["type"] == "invalid_request_error"


# policies


async def test_promoting_and_rolling_back_change_who_answers(world: ServedWorld, http: httpx.Client) -> None:
    await world.memory.policies.draft(system_prompt="Be brief.", parent=0)
    assert http.post("/v1/policies/v1/promote").json()["stage"] == "active"
    assert http.get(f"/v1/trajectories/{ask(http)}").json()["policy"] == "v1"
    listed = http.get("/v1/policies").json()
    assert listed["active"] == "v1" and [one["stage"] for one in listed["data"]] == ["retired", "active"]
    assert http.get("/v1/policies/1").json()["lineage"] == ["v0"]
    assert http.post("/v1/policies/rollback").json()["name"] == "v0"
    assert http.get(f"/v1/trajectories/{ask(http)}").json()["policy"] == "v0"


def test_there_must_be_something_to_roll_back_to(http: httpx.Client) -> None:
    answer = http.post("/v1/policies/rollback")
    assert answer.status_code == 409 and "no policy was active before" in answer.json()["error"]["message"]


async def test_a_rollback_that_names_its_policy_is_safe_to_repeat(world: ServedWorld, http: httpx.Client) -> None:
    await world.memory.policies.draft(system_prompt="Be brief.", parent=0)
    http.post("/v1/policies/v1/promote")
    assert http.post("/v1/policies/v1/rollback").json()["name"] == "v0"
    assert http.post("/v1/policies/v1/rollback").status_code == 409


async def test_an_adapter_that_is_not_there_is_never_promoted(world: ServedWorld, http: httpx.Client) -> None:
    await world.memory.policies.draft(adapter_path=str(world.memory.data_dir / "adapters" / "gone-v1"), parent=0)
    answer = http.post("/v1/policies/v1/promote")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "adapter_refused"
    assert world.memory.policies.active().version == 0


# cycles


def test_a_cycle_runs_in_the_background_and_ends_with_a_report(http: httpx.Client) -> None:
    started = http.post("/v1/cycles", json={"settings": {"practice_episodes": 4}})
    assert started.status_code == 202 and started.json()["status"] == "running"
    path = started.headers["location"]
    assert eventually(lambda: http.get(path).json()["status"] == "completed")
    cycle = http.get(path).json()
    assert (cycle["verdict"]["decision"], cycle["settings"]) == ("promote", {"practice_episodes": 4})
    assert http.get(cycle["report_url"]).json() == {"cells": {}}
    assert http.get(cycle["report_url"], params={"format": "markdown"}).text.startswith("# Release report")
    assert [one["id"] for one in http.get("/v1/cycles").json()["data"]] == [cycle["id"]]


def test_one_cycle_at_a_time_and_it_can_be_cancelled(world: ServedWorld, http: httpx.Client) -> None:
    world.learner.is_held = True
    cycle_id = http.post("/v1/cycles").json()["id"]
    second = http.post("/v1/cycles")
    assert second.status_code == 409 and cycle_id in second.json()["error"]["message"]
    assert http.get(f"/v1/cycles/{cycle_id}/report").status_code == 404
    assert http.post(f"/v1/cycles/{cycle_id}/cancel").json()["status"] == "error"
    assert http.post(f"/v1/cycles/{cycle_id}/cancel").status_code == 409


def test_no_cycle_starts_while_the_engine_does_not_answer(world: ServedWorld, http: httpx.Client) -> None:
    world.engine.is_ready = False
    refused = http.post("/v1/cycles")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_not_ready")
    checked = http.post("/v1/cycles/check").json()
    assert not checked["is_ready"] and [need["name"] for need in checked["data"]] == ["engine"]
    assert "doctor" in checked["data"][0]["mend"] and world.memory.cycles.select() == []
    world.engine.is_ready = True
    assert http.post("/v1/cycles/check").json()["is_ready"]


def test_cancelling_what_is_not_there_is_not_found_in_a_fresh_directory(http: httpx.Client) -> None:
    answer = http.post("/v1/cycles/cyc_none/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "cycle_not_found")


def test_settings_that_cannot_be_are_refused_by_name(http: httpx.Client) -> None:
    answer = http.post("/v1/cycles", json={"settings": {"nonsense": 1}})
    assert answer.status_code == 400 and "'nonsense'" in answer.json()["error"]["message"]


# insights, documents, environments, index


async def test_insights_are_listed_strongest_first(world: ServedWorld, http: httpx.Client) -> None:
    for text, num_agreeing in (("weak", 0), ("strong", 2)):
        kinds = [OperationKind.ADD] + [OperationKind.AGREE] * num_agreeing
        for kind in kinds:
            await world.memory.insights.apply([InsightOperation(kind, "doors", "opening", text)])
    listed = http.get("/v1/insights", params={"environment": "doors"}).json()["data"]
    assert [one["text"] for one in listed] == ["strong", "weak"]
    for offset, text, after in ((0, "strong", 1), (1, "weak", 2), (2, None, None)):
        page = http.get("/v1/insights", params={"limit": 1, "offset": offset}).json()
        assert [one["text"] for one in page["data"]] == ([text] if text else [])
        assert page["next_offset"] == after


def test_documents_come_and_go(http: httpx.Client) -> None:
    made = http.post("/v1/documents", json={"title": "Refunds", "text": "Above 100 EUR a second signature."})
    assert made.status_code == 201
    assert [one["title"] for one in http.get("/v1/documents").json()["data"]] == ["Refunds"]
    assert http.delete(f"/v1/documents/{made.json()['id']}").json()["deleted"] is True
    assert http.delete(f"/v1/documents/{made.json()['id']}").status_code == 404


def test_the_same_question_names_the_same_tasks(http: httpx.Client) -> None:
    query = {"split": "held-out", "num_tasks": 3, "offset": 1}
    tasks = http.get("/v1/environments/doors/tasks", params=query).json()["data"]
    assert [task["name"] for task in tasks] == ["51", "52", "53"]
    names = {"tasks": [task["name"] for task in tasks]}
    assert http.post("/v1/environments/doors/prepare", json=names).json() == {"num_tasks": 3}
    assert [one["name"] for one in http.get("/v1/environments").json()["data"]] == ["doors"]


def test_nobody_plays_a_sealed_task_on_request(world: ServedWorld, http: httpx.Client) -> None:
    hello = [{"role": "user", "content": "hello"}]
    asked = {"model": "agent", "messages": hello, "metadata": {"environment": "doors", "task": "9001"}}
    answers = [
        http.post("/v1/chat/completions", json=asked),
        http.post("/v1/environments/doors/prepare", json={"tasks": ["50", "9009"]}),
    ]
    assert [(it.status_code, it.json()["error"]["code"]) for it in answers] == [(403, "task_sealed")] * 2
    assert "task '9001' of doors is sealed: only the report of a release plays it" in answers[0].text
    assert not world.memory.trajectories.select(limit=1)


def test_the_index_is_rebuilt_from_the_rows(http: httpx.Client) -> None:
    http.post("/v1/documents", json={"title": "Refunds", "text": "Above 100 EUR a second signature."})
    counts = http.post("/v1/index/rebuild", timeout=60).json()["counts"]
    assert counts["passages"] == 1


# health


def test_alive_is_not_yet_ready(world: ServedWorld, http: httpx.Client) -> None:
    assert http.get("/readyz").json() == {"status": "ready", "policy": "v0", "base_model": "scripted", "refusal": None}
    world.engine.is_ready = False
    assert http.get("/healthz").status_code == 200
    answer = http.get("/readyz")
    assert answer.status_code == 503 and "retry-after" in answer.headers


def test_in_maintenance_turns_are_refused_before_they_are_read_and_all_else_answers(
    world: ServedWorld, http: httpx.Client
) -> None:
    services = world.services
    services.maintenance = Maintenance(world.engine, services.hotswap, services.agent.open_episodes, drain_seconds=1.0)
    before = ask(http)
    services.maintenance.reason = "training ratchet-v1 (sft)"
    for path in ("/v1/chat/completions", "/v1/responses"):
        answer = http.post(path, content=b"not even JSON", headers={"content-type": "application/json"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
        assert answer.json()["error"]["code"] == "engine_in_maintenance"
        assert "training ratchet-v1 (sft)" in answer.json()["error"]["message"]
    ready, alive = http.get("/readyz"), http.get("/healthz")
    assert ready.status_code == 503 and ready.json()["error"]["code"] == "engine_in_maintenance"
    assert alive.status_code == 200 and alive.json()["engine"] == "maintenance"
    assert "training" in alive.json()["detail"]
    assert "ratchet_engine_in_maintenance 1.0" in http.get("/metrics").text
    assert http.post("/v1/feedback", json={"target": before, "value": True}).status_code == 201
    services.maintenance.reason = None
    assert http.get("/healthz").json() == {"status": "alive", "engine": "ready", "detail": None}
    ask(http)


def test_whoever_meets_the_closing_engine_within_a_request_is_told_to_come_again(
    world: ServedWorld, http: httpx.Client
) -> None:
    world.services.hotswap.close("training")
    asked = {"model": "agent", "messages": [{"role": "user", "content": "hello"}]}
    for stream in (False, True):
        answer = http.post("/v1/chat/completions", json={**asked, "stream": stream})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
        assert answer.json()["error"]["code"] == "engine_in_maintenance"
    world.services.hotswap.open()
    ask(http)


def test_the_doctor_says_whether_training_finds_room(world: ServedWorld, http: httpx.Client) -> None:
    async def check() -> HealthCheck:
        return HealthCheck("training", False, "GPU 0 is too small", "another one")

    world.services.check_training = check
    diagnosis = http.get("/v1/doctor", timeout=60).json()
    assert not diagnosis["is_ok"]
    assert diagnosis["checks"][-1] == {
        "name": "training",
        "is_ok": False,
        "detail": "GPU 0 is too small",
        "mend": "another one",
    }


def test_a_full_disk_is_said_and_not_a_crash(
    world: ServedWorld, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise StorageError("the disk of 'ratchet.db' is full: free some space")

    trajectory_id = ask(http)
    monkeypatch.setattr(world.memory.feedback, "post", refuse)
    answer = http.post("/v1/feedback", json={"target": trajectory_id, "value": 1})
    assert answer.status_code == 507 and "free some space" in answer.json()["error"]["message"]


def test_the_openapi_page_describes_every_route(http: httpx.Client) -> None:
    page = http.get("/openapi.json").json()
    routes = [route for methods in page["paths"].values() for route in methods.values()]
    assert all(route["summary"] and len(route["tags"]) == 1 for route in routes)
    assert {tag["name"] for tag in page["tags"]} == {tag for route in routes for tag in route["tags"]}
    wanted = {"/v1/chat/completions", "/v1/feedback", "/v1/cycles/{cycle_id}", "/v1/policies/{version}/promote"}
    assert wanted <= set(page["paths"])
    assert {code for route in routes for code in route["responses"] if code >= "400"} >= {"400", "401", "404", "409"}
    assert not any("422" in route["responses"] for route in routes)
