"""The metrics for Prometheus; the dashboard uses no others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.runtime.api.gateway.test_routes import ask
from tests.runtime.api.gateway.test_routes import play as open_a_door
from tests.runtime.api.playing import FORGETFUL, WEATHER, PlayedWorld
from tests.runtime.api.worlds import ServedWorld
from tests.support.waiting import eventually

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"


class Scrape:
    """One answer of `/metrics`: `scrape("ratchet_requests_total", route="/healthz")`."""

    def __init__(self, http: httpx.Client) -> None:
        answer = http.get("/metrics")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
        self.families = list(text_string_to_metric_families(answer.text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        found = [it.value for it in self.samples if it.name == name and labels.items() <= it.labels.items()]
        return sum(found)

    def names(self) -> set[str]:
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        return {family.name + end for family in self.families for end in suffixes.get(family.type, ("",))}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlayedWorld]:
    with PlayedWorld(tmp_path_factory.mktemp("metrics") / "data", memory_config=FORGETFUL) as world:
        yield world


@pytest.fixture
def far(played: PlayedWorld) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=played.url, trust_env=False, timeout=20) as client:
        yield client


def test_a_request_is_counted_by_route_and_its_overhead_is_without_the_model(far: httpx.Client):
    before = Scrape(far)
    ask(far)
    after = Scrape(far)
    route = {"route": "/v1/chat/completions", "method": "POST", "status": "200"}
    assert after("ratchet_requests_total", **route) - before("ratchet_requests_total", **route) == 1
    assert after("ratchet_overhead_seconds_count") - before("ratchet_overhead_seconds_count") == 1
    assert after("ratchet_model_seconds_count", policy="v0") - before("ratchet_model_seconds_count", policy="v0") == 1
    overhead = after("ratchet_overhead_seconds_sum") - before("ratchet_overhead_seconds_sum")
    whole = after("ratchet_request_seconds_sum", route=route["route"])
    assert 0 < overhead < whole
    assert after("ratchet_tokens_total", direction="output") > before("ratchet_tokens_total", direction="output")
    assert (
        after("ratchet_trajectories_total", outcome="finished", split="live")
        == before("ratchet_trajectories_total", outcome="finished", split="live") + 1
    )


def test_a_streamed_answer_has_its_overhead_too(far: httpx.Client):
    before = Scrape(far)("ratchet_overhead_seconds_count")
    body = {"model": "agent", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    assert "[DONE]" in far.post("/v1/chat/completions", json=body).text
    assert eventually(lambda: Scrape(far)("ratchet_overhead_seconds_count") == before + 1)


def test_labels_hold_nothing_that_clients_make_up(far: httpx.Client):
    for path in ("/v1/trajectories/secret-1", "/secret-2", "/feedback/secret-3"):
        far.get(path)
    far.request("SECRET-4", "/healthz")
    assert "secret" not in far.get("/metrics").text.lower()
    assert Scrape(far)("ratchet_requests_total", route="unknown", status="404") >= 1


def test_what_is_done_with_memory_is_measured(world: ServedWorld, http: httpx.Client):
    trajectory_id = ask(http)
    http.post("/v1/feedback", json={"target": trajectory_id, "value": True, "comment": "yes"})
    scrape = Scrape(http)
    assert scrape("ratchet_log_acknowledgement_seconds_count") > 3
    assert scrape("ratchet_log_queue_length") == 0
    assert scrape("ratchet_retrieval_seconds_count", stage="all") == 1
    assert scrape("ratchet_feedback_total", kind="bool") == scrape("ratchet_feedback_total", kind="comment") == 1


def test_tools_and_failures_are_counted(world: ServedWorld, http: httpx.Client):
    open_a_door(http, "3")
    body = {"model": "agent", "messages": [{"role": "user", "content": "crash"}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 502
    scrape = Scrape(http)
    assert scrape("ratchet_tool_seconds_count", tool="open") == 1
    assert scrape("ratchet_model_failures_total", error="PolicyError") == 1
    assert scrape("ratchet_trajectories_total", outcome="finished", split="practice") == 1
    assert scrape("ratchet_trajectories_total", outcome="failed", split="live") == 1


def test_what_was_turned_away_is_counted_by_its_reason(world: ServedWorld, http: httpx.Client):
    world.engine.is_ready, world.engine.num_restarts = False, 2
    assert http.get("/readyz").status_code == 503
    scrape = Scrape(http)
    assert scrape("ratchet_shed_total", reason="engine_not_ready") == 1
    assert (scrape("ratchet_engine_ready"), scrape("ratchet_engine_restarts_total")) == (0, 2)


def test_policies_cycles_and_the_gate_are_shown(world: ServedWorld, http: httpx.Client):
    world.learner.is_held = True
    cycle = http.post("/v1/cycles", json={}).json()["id"]
    assert eventually(lambda: Scrape(http)("ratchet_cycle_stage", stage="collect") == 1)
    assert Scrape(http)("ratchet_cycle_progress_ratio") == 0.5
    world.learner.is_held = False
    assert eventually(lambda: world.memory.cycles.get(cycle).closed_at is not None)
    scrape = Scrape(http)
    assert scrape("ratchet_gate_decisions_total", decision="promote") == 1
    assert scrape("ratchet_cycles_total", outcome="completed") == 1
    assert scrape("ratchet_cycle_stage") == 0
    text = http.get("/metrics").text
    assert 'ratchet_cycle_stage{stage="kto"} 0.0' in text and 'ratchet_cycle_stage{stage="dpo"}' not in text
    assert scrape("ratchet_cycle_stage_seconds_total", stage="collect") > 0
    assert scrape("ratchet_policy_info", policy="v1", stage="active") == 1


def test_a_client_that_runs_tools_costs_overhead_per_request(far: httpx.Client):
    before = Scrape(far)("ratchet_overhead_seconds_count")
    messages = [{"role": "user", "content": "How is Oslo?"}]
    body = {"model": "agent", "messages": messages, "tools": [WEATHER]}
    reply = far.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    messages += [reply, {"role": "tool", "tool_call_id": reply["tool_calls"][0]["id"], "content": "rain"}]
    assert far.post("/v1/chat/completions", json=body).status_code == 200
    assert Scrape(far)("ratchet_overhead_seconds_count") == before + 2


def test_the_dashboard_asks_only_for_what_there_is_and_for_all_that_matters(far: httpx.Client):
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    asked = {
        name
        for panel in panels
        for target in panel.get("targets", ())
        for name in re.findall(r"\b(?:ratchet|process)_[a-z_]+", target["expr"])
    }
    known = Scrape(far).names()
    assert asked <= known
    ours = {name for name in known if name.startswith("ratchet_") and not name.endswith(("_sum", "_count", "_created"))}
    assert ours <= asked, "shown nowhere"
