"""Training data over HTTP: import and export, validated by line, within a tenant."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from memory.formats.registry import FORMATS, write_row
from tests.memory.formats.rows import CALL_ALONE, DEMONSTRATION, LABEL, PLAIN, PREFERENCE, REWARDED, ROUND_TRIPS
from tests.runtime.api.worlds import ServedWorld

LINES = {"Content-Type": "application/x-ndjson"}


def lines_of(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def post(http: httpx.Client, *rows: Any, **query: Any) -> httpx.Response:
    return http.post("/v1/examples", content=lines_of(*rows), headers=LINES, params=query)


def export(http: httpx.Client, content: str, **query: Any) -> list[dict[str, Any]]:
    answer = http.get(f"/v1/export/{content}", params=query)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize(("name", "content"), ROUND_TRIPS, ids=lambda it: it if isinstance(it, str) else it.kind.value)
def test_rows_of_every_format_go_in_and_come_out_as_they_were(http: httpx.Client, name: str, content: Any):
    row = write_row(content, FORMATS[name]) | ({} if name in ("openai", "trl") else {"note": "mine"})
    added = post(http, row, source="mine").json()
    assert (added["format"], added["num_added"], added["num_known"]) == (name, 1, 0)
    assert post(http, row).json()["num_known"] == 1
    if content.reward == 0:
        # a trajectory that failed according to its file is listed, but is no demonstration
        assert export(http, "demonstrations", format=name) == []
        (listed,) = http.get("/v1/examples").json()["data"]
        assert listed["reward"] == 0
    else:
        assert export(http, f"{content.kind.value}s", format=name) == [row]


def test_an_invalid_line_stops_the_request_or_is_skipped_and_named(http: httpx.Client):
    good, bad = write_row(PLAIN, FORMATS["question-answer"]), {"question": 7, "answer": "b"}
    stopped = post(http, good, bad, format="question-answer")
    assert stopped.status_code == 400
    error = stopped.json()["error"]
    assert error["message"].startswith("line 2: 'question' must be a text, not 7") and error["code"] == "invalid_row"
    assert http.get("/v1/examples").json()["data"] == []
    skipped = post(http, good, bad, [], format="question-answer", on_error="skip").json()
    assert (skipped["num_rows"], skipped["num_added"], skipped["num_invalid"]) == (3, 1, 2)
    assert [each["line"] for each in skipped["errors"]] == [2, 3]


@pytest.mark.parametrize(
    ("query", "status", "complaint"),
    [
        ({"format": "parquet"}, 400, "no format is called 'parquet'"),
        ({"environment": "cellar"}, 404, "'cellar'"),
        ({"on_error": "cry"}, 400, "on_error"),
    ],
)
def test_a_request_that_cannot_be_is_refused(http: httpx.Client, query: dict, status: int, complaint: str):
    answer = post(http, write_row(PLAIN, FORMATS["alpaca"]), **query)
    assert answer.status_code == status and complaint in answer.json()["error"]["message"]


def test_examples_are_listed_counted_read_and_deleted(http: httpx.Client):
    for content, source in ((PLAIN, "a"), (LABEL, "a"), (PREFERENCE, "b")):
        post(http, write_row(content, FORMATS["ratchet"]), source=source, environment="doors")
    page = http.get("/v1/examples", params={"limit": 2}).json()
    assert [row["source"] for row in page["data"]] == ["b", "a"]
    assert len(http.get("/v1/examples", params={"before": page["next_before"]}).json()["data"]) == 1
    assert [row["num_examples"] for row in http.get("/v1/examples/counts").json()["data"]] == [1, 1, 1]
    example_id = page["data"][0]["id"]
    detail = http.get(f"/v1/examples/{example_id}").json()
    assert detail["completion"] == PREFERENCE.completion and detail["environment"] == "doors"
    assert http.delete(f"/v1/examples/{example_id}").json()["num_deleted"] == 1
    assert http.get(f"/v1/examples/{example_id}").json()["error"]["code"] == "example_not_found"
    assert http.delete("/v1/examples", params={"source": "a"}).json()["num_deleted"] == 2
    assert http.get("/v1/examples").json()["data"] == []


def test_played_episodes_are_exported_with_cursors_and_without(http: httpx.Client):
    for task in ("0", "1", "2"):  # even tasks are won
        body = {
            "model": "agent",
            "messages": [{"role": "user", "content": "play"}],
            "metadata": {"environment": "doors", "task": task},
        }
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert len(export(http, "trajectories")) == 3
    labels = export(http, "labels", format="trl")
    assert [row["label"] for row in labels] == [True, False, True]
    assert labels[0]["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"door": "left"}
    first, *rows, last = export(http, "demonstrations", format="sharegpt", cursors=True)
    assert first == {"total": 3} and last == {"done": True, "num_rows": 2, "left_out": {}}
    assert [len(row["rows"]) for row in rows] == [1, 0, 1]
    _, *rest, _ = export(http, "demonstrations", format="sharegpt", cursors=True, after=rows[0]["cursor"])
    assert rest == rows[1:]
    left_out = export(http, "demonstrations", format="xlam", cursors=True)[-1]
    assert left_out["num_rows"] == 0 and sum(left_out["left_out"].values()) == 2


@pytest.mark.parametrize(
    ("content", "query", "complaint"),
    [
        ("labels", {"format": "openai"}, "'openai' cannot hold a label: use one of trl"),
        ("labels", {"format": "csv"}, "no format is called 'csv'"),
        ("labels", {"after": "tomorrow"}, "no cursor 'tomorrow'"),
        ("wishes", {}, "wishes"),
    ],
)
def test_an_export_that_cannot_be_is_refused(http: httpx.Client, content: str, query: dict, complaint: str):
    answer = http.get(f"/v1/export/{content}", params=query)
    assert answer.status_code == (404 if content == "wishes" else 400) and complaint in answer.text


def test_what_is_imported_stays_in_its_tenant_and_teaches_as_its_key(world: ServedWorld, http: httpx.Client):
    def create(name: str, tenant: str, *scopes: str) -> dict[str, str]:
        body = {"name": name, "tenant": tenant, "scopes": list(scopes)}
        created = http.post("/v1/keys", json=body, headers=operator).json()
        return {"Authorization": f"Bearer {created['key']}"}

    operator: dict[str, str] = {}
    created = http.post("/v1/keys", json={"name": "operator", "scopes": ["admin"]}).json()
    operator |= {"Authorization": f"Bearer {created['key']}"}
    shop = create("the shop", "shop", "learn", "teach")
    app = create("the app", "shop", "infer")
    other = create("another", "bakery", "learn")
    rows = lines_of(*(write_row(each, FORMATS["ratchet"]) for each in (DEMONSTRATION, CALL_ALONE, REWARDED)))
    for headers, status, teaches in ((app, 403, None), (other, 200, False), (shop, 200, True)):
        answer = http.post("/v1/examples", content=rows, headers=LINES | headers)
        assert answer.status_code == status and answer.json().get("teaches") is teaches
    assert http.get("/v1/export/labels", headers=app).status_code == 403
    theirs = http.get("/v1/examples", headers=shop).json()["data"]
    assert len(theirs) == 3 and len(http.get("/v1/examples", headers=app).json()["data"]) == 3
    for method in ("GET", "DELETE"):
        assert http.request(method, f"/v1/examples/{theirs[0]['id']}", headers=other).status_code == 404
    assert http.get("/v1/examples", headers=operator).json()["data"] == []
    assert len(http.get("/v1/export/demonstrations", headers=shop).text.splitlines()) == 2
    learned = world.memory.examples.learnable(theirs[0]["kind"], environments=("",), limit=10)
    assert {it.teacher.tenant for it in learned} == {"shop"} and len(learned) == 2
