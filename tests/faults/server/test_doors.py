"""Every route of the OpenAPI page against every kind of key: no caller gets more than its scopes and tenant permit."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from memory.records.insights import InsightOperation, OperationKind
from memory.schema import Scope
from runtime.api.gateway.permissions import OPERATE, ROUTE_PERMISSIONS
from tests.runtime.api.worlds import ServedWorld, error_code

SECRET = "the plan is a zebra"


class Premises:
    """A running server with two tenants, rows of the first, and every route of the page."""

    def __init__(self, world: ServedWorld) -> None:
        self.world = world
        self.keys: dict[str, str] = {}
        everything = [scope for scope in Scope if scope is not Scope.ADMIN]
        for name, scopes, tenant in (
            ("operator", [Scope.ADMIN], ""),
            ("acme", everything, "acme"),
            ("zeta", everything, "zeta"),
            ("zeta-admin", [Scope.ADMIN], "zeta"),
            *((scope.value, [scope], "") for scope in everything),
        ):
            _, self.keys[name] = asyncio.run(world.memory.keys.create(name, scopes, tenant=tenant))
        with self.http("operator") as http:
            page = http.get("/openapi.json").json()
        self.routes = sorted(
            (method.upper(), path)
            for path, methods in page["paths"].items()
            for method, route in methods.items()
            if route["security"]
        )
        with self.http("acme") as http:
            ask = {"model": "agent", "messages": [{"role": "user", "content": SECRET}]}
            self.trajectory = http.post("/v1/chat/completions", json=ask).json()["id"]
            said = {"model": "agent", "input": SECRET}
            self.response = http.post("/v1/responses", json=said).json()["id"]
            read = {"title": SECRET, "text": SECRET}
            self.document = http.post("/v1/documents", json=read).json()["id"]
        lesson = InsightOperation(OperationKind.ADD, "doors", "opening", SECRET, tenant="acme")
        (self.insight,) = [row.id for row in asyncio.run(world.memory.insights.apply([lesson]))]

    def http(self, name: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys.get(name, name)}"} if name is not None else None
        return httpx.Client(base_url=self.world.url, headers=headers, trust_env=False, timeout=20)

    def fill(self, path: str) -> str:
        """Fill a path's parameters with the first tenant's ids, or with other valid values."""
        values = {
            "{trajectory_id}": self.trajectory,
            "{response_id}": self.response,
            "{document_id}": self.document,
            "{insight_id}": self.insight,
            "{version}": "0",
            "{environment}": "doors",
            "{model}": "agent",
            "{cycle_id}": "cyc_none",
            "{key_id}": "key_none",
        }
        return "/".join(values.get(part, part) for part in path.split("/"))

    def names_a_tenants_row(self, path: str) -> bool:
        return any(part in path for part in ("{trajectory_id}", "{response_id}", "{document_id}", "{insight_id}"))


@pytest.fixture(scope="module")
def premises(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Premises]:
    with ServedWorld(tmp_path_factory.mktemp("premises") / "data") as world:
        yield Premises(world)


def test_no_key_and_a_wrong_key_open_nothing(premises: Premises) -> None:
    answers = set()
    for name in (None, "ratchet_wrong", "operator-of-another-server"):
        with premises.http(name) as http:
            for method, path in premises.routes:
                answer = http.request(method, premises.fill(path))
                answers.add((answer.status_code, error_code(answer)))
    assert answers == {(401, "invalid_api_key")}


def test_a_scope_opens_nothing_beyond_itself(premises: Premises) -> None:
    let_in = []
    for scope in (scope for scope in Scope if scope is not Scope.ADMIN):
        with premises.http(scope.value) as http:
            for method, path in premises.routes:
                if scope not in ROUTE_PERMISSIONS.get((method, path), OPERATE).scopes:
                    answer = http.request(method, premises.fill(path))
                    if (answer.status_code, error_code(answer)) != (403, "insufficient_scope"):
                        let_in.append((scope, method, path, answer.status_code))
    assert let_in == []


def bodies_that_name(premises: Premises) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests that name the first tenant's rows in their bodies, not in the path."""
    ask = {"model": "agent", "messages": [{"role": "user", "content": "hello"}]}
    return [
        ("POST", "/v1/responses", {"model": "agent", "input": "x", "previous_response_id": premises.response}),
        *(
            ("POST", "/v1/feedback", {field: name, "value": True})
            for field, name in itertools.product(("target", "inference_id"), (premises.trajectory, premises.response))
        ),
        ("POST", "/v1/feedback/links", {"target": premises.trajectory}),
        ("POST", "/v1/chat/completions", ask),
    ]


def test_another_tenant_finds_nothing_by_id_and_reads_nothing_in_lists(premises: Premises) -> None:
    found = []
    for name in ("zeta", "zeta-admin", "operator"):
        with premises.http(name) as http:
            for method, path in premises.routes:
                if method == "GET" or premises.names_a_tenants_row(path):
                    body = {"text": "mine now"} if path.endswith("/edit") else None
                    answer = http.request(method, premises.fill(path), json=body)
                    is_there = premises.names_a_tenants_row(path) and answer.status_code != 404
                    if is_there or "zebra" in answer.text or answer.status_code >= 500:
                        found.append((name, method, path, answer.status_code))
            for method, path, body in bodies_that_name(premises):
                answer = http.request(method, path, json=body)
                is_theirs = path == "/v1/chat/completions" and answer.status_code == 200
                if "zebra" in answer.text or not (is_theirs or answer.status_code == 404):
                    found.append((name, method, path, answer.status_code))
    assert found == []
    with premises.http("acme") as http:  # nothing was deleted
        for path in (f"/v1/trajectories/{premises.trajectory}", f"/v1/responses/{premises.response}", "/v1/documents"):
            assert "zebra" in http.get(path).text


def test_what_all_tenants_share_is_closed_to_the_administrator_of_one(premises: Premises) -> None:
    with premises.http("zeta-admin") as http:
        statuses = {
            (method, path): http.request(method, premises.fill(path)).status_code
            for method, path in premises.routes
            if ROUTE_PERMISSIONS.get((method, path), OPERATE).is_shared
        }
    assert statuses and set(statuses.values()) == {403}
