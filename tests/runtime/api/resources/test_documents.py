"""Documents over HTTP: search, upload, reading back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from memory.schema import Scope
from runtime.cli.client import Client
from tests.runtime.api.worlds import ServedWorld
from tests.support.waiting import eventually


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


def test_a_file_is_uploaded_as_a_form_and_read_back_by_its_id(http: httpx.Client) -> None:
    text = "# Refunds\n\nAbove 100 EUR: [a second signature]."
    made = http.post("/v1/documents/upload", files={"file": ("refunds.md", text, "text/markdown")})
    assert made.status_code == 201, made.text
    assert made.json()["title"] == "refunds.md"
    assert http.get(f"/v1/documents/{made.json()['id']}").json() == {**made.json(), "passages": [text]}
    named = {"title": "Money back", "is_trusted": "false"}
    again = http.post("/v1/documents/upload", files={"file": ("x.md", "Another text.")}, data=named)
    assert again.json()["title"] == "Money back"


def test_what_is_no_text_is_refused_with_its_name_and_type(http: httpx.Client) -> None:
    picture = {"file": ("stove.png", b"\x89PNG\xff\xfe", "image/png")}
    refused = http.post("/v1/documents/upload", files=picture)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "file"
    assert "'stove.png' (image/png)" in refused.json()["error"]["message"]
    assert http.post("/v1/documents/upload", files={"title": (None, "x")}).json()["error"]["param"] == "file"


def test_a_document_is_read_by_its_own_tenant_alone(tenants: dict[str, httpx.Client]) -> None:
    document = add(tenants["acme"], "The plan", "Our secret plan is a zebra.")
    assert tenants["acme"].get(f"/v1/documents/{document}").json()["passages"] == ["Our secret plan is a zebra."]
    theirs = tenants["zeta"].get(f"/v1/documents/{document}")
    assert theirs.status_code == 404 and theirs.json()["error"]["code"] == "document_not_found"


async def test_documents_are_listed_in_pages_that_the_command_line_puts_together(
    world: ServedWorld, http: httpx.Client
) -> None:
    for number in range(3):
        add(http, f"Zebra {number}", f"The zebra number {number} has stripes.")
    first = http.get("/v1/documents", params={"limit": 2}).json()
    assert ([row["title"] for row in first["data"]], first["next_offset"]) == (["Zebra 0", "Zebra 1"], 2)
    second = http.get("/v1/documents", params={"limit": 2, "offset": 2}).json()
    assert ([row["title"] for row in second["data"]], second["next_offset"]) == (["Zebra 2"], None)

    assert http.get("/v1/documents", params={"limit": 501}).status_code == 400
    async with Client(world.url) as client:
        assert (await client.get_all("/v1/documents", limit=1))["data"] == first["data"] + second["data"]


@pytest.mark.parametrize("path", ["documents", "insights", "environments/doors/tasks"])
def test_an_offset_that_no_database_can_hold_is_refused(http: httpx.Client, path: str) -> None:
    response = http.get(f"/v1/{path}", params={"offset": 2**63})
    assert response.status_code == 400 and "offset" in response.text
