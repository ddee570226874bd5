"""A server with its rows in PostgreSQL: it answers, stores, takes feedback, and survives its database's crash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog

from runtime.doctor import check_rows
from tests.memory.episodes import PATIENT
from tests.runtime.api.gateway.test_routes import ask
from tests.runtime.api.worlds import ServedWorld
from tests.support.postgresql import Cluster, skip_without_postgresql, start_cluster
from tests.support.waiting import eventually

skip_without_postgresql()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from start_cluster()


@pytest.fixture
def world(cluster: Cluster, tmp_path: Path) -> Iterator[ServedWorld]:
    url = cluster.url(cluster.create_database())
    structlog.configure(processors=[structlog.processors.JSONRenderer()])  # a traceback in colours takes seconds
    with ServedWorld(tmp_path / "data", memory_config=PATIENT.model_copy(update={"database": url})) as world:
        yield world


def test_an_answer_its_trajectory_and_its_feedback_are_rows_on_the_server(
    world: ServedWorld, http: httpx.Client, cluster: Cluster
):
    answer_id = ask(http, "hello")
    said = http.post("/v1/feedback", json={"target": answer_id, "value": True, "comment": "right"})
    assert said.status_code == 201
    trajectory = http.get(f"/v1/trajectories/{answer_id}").json()
    assert (trajectory["answer"], trajectory["reward"]) == ("You said: hello", 1.0)
    name = world.memory.config.database.partition("?")[0].rpartition("/")[2]
    rows = "SELECT answer, value FROM trajectories JOIN rewards ON trajectory_id = trajectories.id"
    assert cluster.run_sql(name, rows) == [("You said: hello", 1.0)]
    assert "ratchet.db" not in {path.name for path in world.memory.data_dir.iterdir()}
    assert check_rows(world.memory).name == "postgresql" and check_rows(world.memory).is_ok


def test_while_the_server_is_away_nothing_is_answered_and_then_all_is(
    world: ServedWorld, http: httpx.Client, cluster: Cluster
):
    before_id = ask(http, "hello")
    cluster.stop(is_crash=True)
    body = {"model": "agent", "messages": [{"role": "user", "content": "are you there"}]}
    refused = http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 507 and "see that the server is up" in refused.text
    assert not check_rows(world.memory).is_ok
    cluster.start()
    assert eventually(lambda: http.post("/v1/chat/completions", json=body).status_code == 200)
    assert http.get(f"/v1/trajectories/{before_id}").json()["answer"] == "You said: hello"
