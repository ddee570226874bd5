"""Documents over HTTP: search, upload, reading back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from memory.schema import Scope
from tests.api.worlds import ServedWorld, eventually


def add(http: httpx.Client, title: str, text: str) -> str:
    answer = http.post("/v1/documents", json={"title": title, "text": text})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def search(http: httpx.Client, query: str, **others: object) -> list[dict]:
    answer = http.post("/v1/documents/search", json={"query": query, **others})
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] == "list"
    return answer.json()["data"]


@pytest.fixture
def tenants(world: ServedWorld) -> Iterator[dict[str, httpx.Client]]:
    clients = {}
    for name, scopes in (("acme", [Scope.INFER, Scope.LEARN]), ("zeta", [Scope.INFER]), ("critic", [Scope.FEEDBACK])):
        _, key = asyncio.run(world.memory.keys.create(name, scopes, tenant=name))
        headers = {"Authorization": f"Bearer {key}"}
        clients[name] = httpx.Client(base_url=world.url, headers=headers, trust_env=False, timeout=20)
    yield clients
    for client in clients.values():
        client.close()


def test_a_search_returns_the_passage_that_fits_first_with_its_document(http: httpx.Client) -> None:
    refunds = add(http, "Refunds", "Refunds above 100 EUR need a second signature.")
    add(http, "Zebras", "A zebra has stripes.")
    assert eventually(lambda: len(search(http, "second signature for refunds")) > 0)
    first = search(http, "second signature for refunds")[0]
    assert first.pop("score") > 0
    assert first == {
        "document_id": refunds,
        "title": "Refunds",
        "text": "Refunds above 100 EUR need a second signature.",
    }


def test_a_search_returns_no_more_passages_than_its_limit(http: httpx.Client) -> None:
    for number in range(3):
        add(http, f"Zebra {number}", f"The zebra number {number} has stripes.")
    assert eventually(lambda: len(search(http, "zebra stripes", limit=3)) == 3)
    assert len(search(http, "zebra stripes", limit=2)) == 2
    for body in ({"query": ""}, {"query": "x", "limit": 0}, {"query": "x", "limit": 101}, {"query": "x", "top": 1}):
        answer = http.post("/v1/documents/search", json=body)
        assert answer.status_code == 400, body


def test_a_search_finds_the_tenants_own_documents_alone(tenants: dict[str, httpx.Client]) -> None:
    add(tenants["acme"], "The plan", "Our secret plan is a zebra.")
    assert eventually(lambda: len(search(tenants["acme"], "secret plan")) == 1)
    assert search(tenants["zeta"], "secret plan") == []
    refused = tenants["critic"].post("/v1/documents/search", json={"query": "secret plan"})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "insufficient_scope"
