"""Permissions: every route against every kind of key, and the isolation of tenants, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from memory.records.insights import InsightOperation, OperationKind
from memory.schema import Scope
from memory.store import Memory
from runtime.api.errors import Forbidden
from runtime.api.gateway.permissions import OPEN_PATHS, ROUTE_PERMISSIONS, Caller, is_open, require_permission
from runtime.tools.documents import document_search
from tests.runtime.api.playing import WEATHER
from tests.runtime.api.worlds import ServedWorld, error_code
from tests.support.waiting import eventually

ALL_BUT_ADMIN = ["infer", "feedback", "learn"]


def make_key(memory: Memory, name: str, scopes: list[str], **more: Any) -> tuple[str, str]:
    """Return (id, key)."""
    row, key = asyncio.run(memory.keys.create(name, scopes, **more))
    return row.id, key


class Keyed:
    """A server that requires keys, and clients with one key each."""

    def __init__(self, world: ServedWorld) -> None:
        self.world = world
        self.memory = world.memory
        self.keys: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        for name, scopes, tenant in (
            ("operator", ["admin"], ""),
            ("acme", ALL_BUT_ADMIN, "acme"),
            ("zeta", ALL_BUT_ADMIN, "zeta"),
            ("acme-admin", ["admin"], "acme"),
            *((scope, [scope], "") for scope in ALL_BUT_ADMIN),
        ):
            self.ids[name], self.keys[name] = make_key(world.memory, name, scopes, tenant=tenant)

    def http(self, name: str | None = None, *, key: str | None = None) -> httpx.Client:
        key = key or (self.keys[name] if name else None)
        headers = {"Authorization": f"Bearer {key}"} if key else None
        return httpx.Client(base_url=self.world.url, headers=headers, trust_env=False, timeout=20)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    tools: list = []
    with ServedWorld(tmp_path_factory.mktemp("keys") / "data", tools=tools) as world:
        tools.append(document_search(world.memory.retrieval.find_passages))
        yield Keyed(world)


def ask(http: httpx.Client, text: str = "hello", **more: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": "agent", "messages": [user(text)], **more})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def fill(path: str) -> str:
    return "/".join("nobody" if part.startswith("{") else part for part in path.split("/"))


# permissions of routes


def test_every_route_has_a_door_and_no_door_leads_nowhere(keyed: Keyed) -> None:
    with keyed.http() as http:
        page = http.get("/openapi.json").json()
    routes = {(method.upper(), path) for path, methods in page["paths"].items() for method in methods}
    assert {(method, path) for method, path in routes - set(ROUTE_PERMISSIONS) if not is_open(path)} == set()
    assert set(ROUTE_PERMISSIONS) <= routes
    closed = {
        route["security"] == [{"key": []}]
        for path in {it for _, it in ROUTE_PERMISSIONS}
        for route in page["paths"][path].values()
    }
    assert closed == {True}


def test_a_route_without_a_door_opens_to_administrators_alone() -> None:
    with pytest.raises(Forbidden, match="needs the scope admin"):
        require_permission(Caller(scopes=frozenset(ALL_BUT_ADMIN)), "GET", "/v1/new")
    require_permission(Caller(scopes=frozenset({Scope.ADMIN})), "GET", "/v1/new")


def test_without_a_key_that_is_in_force_every_route_answers_the_same(keyed: Keyed) -> None:
    key_id, revoked = make_key(keyed.memory, "gone", ["admin"])
    asyncio.run(keyed.memory.keys.revoke(key_id))
    presented = [None, "Bearer", "Bearer none", f"Bearer {revoked}", f"Basic {keyed.keys['operator']}", "Bearer \xff"]
    answers: dict[bool, set[tuple[int, str]]] = {}
    with keyed.http() as http:
        for method, path in [*ROUTE_PERMISSIONS, ("GET", "/v1/nowhere")]:
            for value in presented if path == "/v1/models" else presented[:4:3]:
                headers = {} if value is None else {"Authorization": value.encode("latin-1")}
                answer = http.request(method, fill(path), headers=headers)
                assert answer.headers["www-authenticate"] == "Bearer"
                answers.setdefault(path.startswith("/v1/messages"), set()).add((answer.status_code, answer.text))
        assert [http.get(path).status_code for path in sorted(OPEN_PATHS)] == [200] * len(OPEN_PATHS)
    for is_anthropic, name in ((False, "code"), (True, "error_code")):
        ((status, text),) = answers[is_anthropic]
        assert status == 401 and f'"{name}":"invalid_api_key"' in text


@pytest.mark.parametrize("scope", ALL_BUT_ADMIN)
def test_a_scope_opens_its_own_doors_alone(keyed: Keyed, scope: str) -> None:
    with keyed.http(scope) as http:
        for (method, path), door in ROUTE_PERMISSIONS.items():
            if scope not in door.scopes:
                answer = http.request(method, fill(path))
                assert (answer.status_code, error_code(answer)) == (403, "insufficient_scope"), path
            elif method == "GET":
                assert http.get(fill(path)).status_code in (200, 404), path


def test_what_all_tenants_share_opens_to_the_default_tenant_alone(keyed: Keyed) -> None:
    with keyed.http("acme-admin") as http:
        for (method, path), door in ROUTE_PERMISSIONS.items():
            if door.is_shared:
                answer = http.request(method, fill(path))
                assert (answer.status_code, error_code(answer)) == (403, "not_your_tenant"), path
        assert http.get("/v1/documents").status_code == 200


def test_what_is_not_there_is_said_only_to_who_has_a_key(keyed: Keyed) -> None:
    with keyed.http("infer") as http:
        assert http.get("/v1/nowhere").status_code == 404
        assert http.get("/v1/chat/completions").status_code == 405


def test_the_official_client_understands_each_refusal(keyed: Keyed) -> None:
    for key, refusal in (("none", openai.AuthenticationError), (keyed.keys["feedback"], openai.PermissionDeniedError)):
        with (
            openai.OpenAI(base_url=f"{keyed.world.url}/v1", api_key=key, max_retries=0) as client,
            pytest.raises(refusal),
        ):
            client.chat.completions.create(model="agent", messages=[user("hello")])


# keys over HTTP


def test_keys_are_made_listed_and_revoked_over_http(keyed: Keyed) -> None:
    with keyed.http("operator") as http:
        body = {"name": "shop", "scopes": ["infer"], "tenant": "shop", "requests_per_minute": 5}
        made = http.post("/v1/keys", json=body)
        assert made.status_code == 201 and made.json()["key"].startswith("ratchet_")
        with keyed.http(key=made.json()["key"]) as shop:
            assert shop.get("/v1/models").status_code == 200
            assert eventually(lambda: http.get("/v1/keys").json()["data"][-1]["last_used_at"] is not None)
            assert http.post(f"/v1/keys/{made.json()['id']}/revoke").json()["revoked_at"] is not None
            assert shop.get("/v1/models").status_code == 401
        assert made.json()["key"] not in http.get("/v1/keys").text
        assert http.post("/v1/keys", json=body | {"scopes": ["fly"]}).status_code == 400
        assert http.post("/v1/keys", json=body | {"tenant": "a b"}).json()["error"]["code"] == "invalid_value"
        assert http.post("/v1/keys/nobody/revoke").json()["error"]["code"] == "key_not_found"


# tenants


def test_nothing_of_one_tenant_is_there_for_another(keyed: Keyed) -> None:
    with keyed.http("acme") as acme, keyed.http("zeta") as zeta, keyed.http("operator") as operator:
        named = {"episode_id": "episode-acme"}
        answer = ask(acme, "our secret plan", metadata=named).json()["id"]
        response = acme.post("/v1/responses", json={"model": "agent", "input": "our secret plan"}).json()["id"]
        document = acme.post("/v1/documents", json={"title": "The secret", "text": "our secret plan"}).json()["id"]
        lesson = InsightOperation(OperationKind.ADD, "doors", "opening", "our secret plan", tenant="acme")
        asyncio.run(keyed.memory.insights.apply([lesson]))
        going_on = {"model": "agent", "input": "and then?", "previous_response_id": response}
        for other in (zeta, operator):
            for method, path, body in (
                ("GET", f"/v1/trajectories/{answer}", None),
                ("POST", f"/v1/trajectories/{answer}/close", None),
                ("GET", f"/v1/responses/{response}", None),
                ("GET", f"/v1/responses/{response}/input_items", None),
                ("DELETE", f"/v1/responses/{response}", None),
                ("POST", "/v1/responses", going_on),
                ("DELETE", f"/v1/documents/{document}", None),
                ("POST", "/v1/feedback", {"target": answer, "value": True}),
                ("POST", "/v1/feedback", {"inference_id": response, "value": True}),
                ("POST", "/v1/feedback", {"episode_id": "episode-acme", "value": True}),
            ):
                theirs = other.request(method, path, json=body)
                assert theirs.status_code == 404, path
                assert "secret" not in theirs.text
            for path in ("/v1/trajectories?limit=500", "/v1/documents", "/v1/insights"):
                assert "secret" not in other.get(path).text
        for path in ("/v1/trajectories?limit=500", "/v1/documents", "/v1/insights", f"/v1/responses/{response}"):
            assert "secret" in acme.get(path).text
        assert acme.post("/v1/responses", json=going_on).status_code == 200


def test_an_id_that_two_tenants_chose_is_two(keyed: Keyed) -> None:
    targets = {}
    for name in ("acme", "zeta"):
        with keyed.http(name) as http:
            targets[name] = ask(http, metadata={"episode_id": "episode-1"}).json()["id"]
            said = http.post("/v1/feedback", json={"episode_id": "episode-1", "comment": name, "id": "ticket-1"})
            assert said.status_code == 201
            assert said.json() == {"feedback_id": "ticket-1", "trajectory_id": targets[name], "is_new": True}
    assert targets["acme"] != targets["zeta"]


def test_another_tenants_episode_is_not_gone_on_with(keyed: Keyed) -> None:
    messages = [user("How is Oslo, tenants?")]
    with keyed.http("acme") as acme, keyed.http("zeta") as zeta:
        body = {"model": "agent", "messages": messages, "tools": [WEATHER]}
        first = acme.post("/v1/chat/completions", json=body).json()
        result = {"role": "tool", "tool_call_id": "call-weather", "content": "rain"}
        body["messages"] = [*messages, first["choices"][0]["message"], result]
        stolen = zeta.post("/v1/chat/completions", json=body).json()
        resumed = acme.post("/v1/chat/completions", json=body).json()
    assert stolen["ratchet"]["trajectory_id"] != first["id"]
    assert resumed["ratchet"]["trajectory_id"] == first["id"] and resumed["id"] == f"{first['id']}.1"


def test_an_episode_that_another_tenant_named_alike_is_no_reason_to_wait(keyed: Keyed) -> None:
    named = {"metadata": {"episode_id": "episode-busy"}}

    async def both() -> list[int]:
        async def one(name: str, text: str, timeout: float) -> int:
            headers = {"Authorization": f"Bearer {keyed.keys[name]}"}
            body = {"model": "agent", "messages": [user(text)], **named}
            async with httpx.AsyncClient(trust_env=False, timeout=timeout, headers=headers) as http:
                return (await http.post(f"{keyed.world.url}/v1/chat/completions", json=body)).status_code

        waiting = asyncio.ensure_future(one("acme", "wait", 20))
        while not any("wait" in str(call["messages"]) for call in keyed.world.engine.calls):
            await asyncio.sleep(0.01)
        statuses = [await one("acme", "hello", 20), await one("zeta", "hello", 20)]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return statuses

    assert asyncio.run(both()) == [409, 200]


def test_the_engine_keeps_tenants_prefixes_apart(keyed: Keyed) -> None:
    salts = {}
    for name in ("acme", "zeta", "operator"):
        with keyed.http(name) as http:
            for stream in (False, True):
                assert ask(http, f"salt of {name}", stream=stream).status_code == 200
        calls = [it for it in keyed.world.engine.calls if f"salt of {name}" in str(it["messages"])]
        assert len(calls) == 2
        (salts[name],) = {it.get("cache_salt") for it in calls}
    assert salts["operator"] is None and salts["acme"] != salts["zeta"]
    assert len(salts["acme"]) == 64  # vLLM takes up to 128, without '@', '/' and '\'
    with keyed.http("zeta") as http:
        assert ask(http, cache_salt=salts["acme"]).json()["error"]["code"] == "unsupported_parameter"


async def test_the_document_tool_searches_the_tenants_documents(keyed: Keyed) -> None:
    for tenant in ("", "acme"):
        await keyed.memory.documents.ingest("Zebras", f"A zebra of {tenant or 'default'} has stripes.", tenant=tenant)
    await keyed.memory.index.drain()
    engine = keyed.world.engine
    played = type(engine).chat

    async def chat(model, messages, tools=None, **sampling):
        heard = [message["content"] for message in messages if message["role"] == "tool"]
        if heard or "zebra" not in messages[-1]["content"]:
            return await played(engine, model, [user(f"Heard {heard}")], None, **sampling)
        completion = await played(engine, model, messages, None, **sampling)
        function = {"name": "search_documents", "arguments": '{"query": "which zebra has stripes"}'}
        completion.tool_calls = [{"id": "call-1", "type": "function", "function": function}]
        return completion

    engine.client.chat = chat
    try:
        for name, owner in (("acme", "acme"), ("operator", "default")):
            with keyed.http(name) as http:
                no_memory = {"use_memory": "off"}
                answer = await asyncio.to_thread(ask, http, "zebra", metadata=no_memory)
            content = answer.json()["choices"][0]["message"]["content"]
            assert f"A zebra of {owner} has stripes." in content and content.count("zebra") == 1
    finally:
        del engine.client.chat


# quotas


def test_a_key_may_ask_so_often_and_no_more(keyed: Keyed) -> None:
    _, key = make_key(keyed.memory, "hasty", ["infer"], requests_per_minute=3)
    with keyed.http(key=key) as http:
        answers = [http.get("/v1/models") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert answers[3].json()["error"] | {"message": ""} == {
            "message": "",
            "type": "requests",
            "param": None,
            "code": "rate_limit_exceeded",
        }
        assert 1 <= int(answers[3].headers["retry-after"]) <= 20
        assert http.get("/healthz").status_code == 200
    with keyed.http("infer") as http:  # each key has its own quota
        assert http.get("/v1/models").status_code == 200
    with (
        openai.OpenAI(base_url=f"{keyed.world.url}/v1", api_key=key, max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_counted_when_they_are_known(keyed: Keyed, stream: bool) -> None:
    _, key = make_key(keyed.memory, "wordy", ["infer"], tokens_per_minute=20)
    with keyed.http(key=key) as http:
        # 13 tokens each: the second request begins within the quota, and overdraws it.
        statuses = [ask(http, stream=stream).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        refused = http.get("/v1/models")
        assert refused.json()["error"]["type"] == "tokens" and 1 <= int(refused.headers["retry-after"]) <= 21


def test_tokens_of_an_episode_that_failed_count_too(keyed: Keyed) -> None:
    _, key = make_key(keyed.memory, "unlucky", ["infer"], tokens_per_minute=1)
    with keyed.http(key=key) as http:
        body = {"metadata": {"environment": "doors", "task": "x"}}
        assert ask(http, **body).status_code == 404  # cost nothing
        assert ask(http, "hello").status_code == 200
        assert ask(http, "hello").status_code == 429


# permission to teach


@pytest.mark.parametrize(("scopes", "does_teach"), [(["infer", "feedback"], False), ([*ALL_BUT_ADMIN, "teach"], True)])
@pytest.mark.parametrize("way", ["feedback", "link"])
def test_feedback_and_links_teach_the_weights_only_with_a_key_that_may(
    keyed: Keyed, scopes: list[str], does_teach: bool, way: str
) -> None:
    key_id, key = make_key(keyed.memory, "the shop", scopes, tenant="shop")
    said = {"value": True, "correction": "We open at nine."}
    with keyed.http(key=key) as http:
        target = ask(http).headers["X-Trajectory-Id"]
        if way == "feedback":
            assert http.post("/v1/feedback", json={"target": target, "user": "anna", **said}).status_code == 201
        else:
            link = {"target": target, "user": "anna", "may_correct": True}
            path = http.post("/v1/feedback/links", json=link).json()["path"]
            with keyed.http() as anybody:
                assert anybody.post(path, data={**said, "value": "true"}).status_code == 200

    (kept,) = keyed.memory.feedback.select(target)
    assert (kept.key_id, kept.user_id) == (key_id, "anna")
    assert keyed.memory.trajectories.effective_reward(target) == 1.0
    learned = {it.trajectory.id for it in keyed.memory.trajectories.learnable(is_for_weights=True)}
    corrected = {it.trajectory.id for it in keyed.memory.feedback.corrections(limit=100, is_for_weights=True)}
    assert (target in learned) == (target in corrected) == does_teach


def test_teaching_by_itself_opens_no_route(keyed: Keyed) -> None:
    _, key = make_key(keyed.memory, "only teaches", ["teach"])
    with keyed.http(key=key) as http:
        assert ask(http).status_code == 403
        assert http.post("/v1/feedback", json={"target": "trj_1", "value": True}).status_code == 403
