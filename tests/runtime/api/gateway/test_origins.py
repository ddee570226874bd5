"""Requests that a foreign page makes a browser send are refused by host, origin or type."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from runtime.api.errors import BadRequest, Misdirected
from runtime.api.gateway.origins import OriginCheck, strip_port
from runtime.api.services import Services
from runtime.config import ServerConfig
from tests.runtime.api.worlds import ServedWorld

OURS = ServerConfig(allowed_hosts=("Agent.Example",), cors_origins=("https://app.example",))
HELLO = {"model": "agent", "messages": [{"role": "user", "content": "hello"}]}


def use(services: Services) -> None:
    services.server = OURS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWorld]:
    with ServedWorld(tmp_path_factory.mktemp("origins") / "data", change=use) as world:
        yield world


@pytest.fixture
def http(world: ServedWorld) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=world.url, trust_env=False, timeout=20) as client:
        yield client


def checks(config: ServerConfig) -> OriginCheck:
    """Return the check, in front of an app that must not be called."""

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("nothing is behind it")

    return OriginCheck(nothing, config)


def code_of(answer: httpx.Response) -> str | None:
    return answer.json()["error"]["code"] if answer.is_error else None


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.", "1.2.3.4"]
)
@pytest.mark.parametrize("path", ["/v1/trajectories", "/healthz", "/openapi.json", "/feedback/x"])
def test_a_name_that_is_not_ours_reads_nothing(http: httpx.Client, host: str, path: str) -> None:
    answer = http.get(path, headers={"host": host})
    assert (answer.status_code, code_of(answer)) == (421, "host_not_allowed")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:80", "agent.example", "agent.example:443"]
)
def test_our_names_are_answered(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/trajectories", headers={"host": host}).status_code == 200


def test_a_server_on_every_address_answers_as_each_but_not_as_any_name() -> None:
    gate = checks(ServerConfig(host="0.0.0.0"))
    for host in ("192.168.1.5:8080", "[fd00::1]:8080", "localhost"):
        assert gate._require_host(Headers({"host": host})) == host
    with pytest.raises(Misdirected, match=r"server\.allowed_hosts"):
        gate._require_host(Headers({"host": "evil.example"}))


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},  # another server on this machine
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://app.example.evil.example"},
    ],
)
def test_a_foreign_page_changes_nothing(world: ServedWorld, http: httpx.Client, headers: dict[str, str]) -> None:
    cycle = http.post("/v1/cycles", headers=headers)
    chat = http.post("/v1/chat/completions", json=HELLO, headers=headers)
    for answer in (cycle, chat):
        assert (answer.status_code, code_of(answer)) == (403, "origin_not_allowed")
    assert (world.memory.cycles.select(), world.memory.trajectories.select()) == ([], [])


@pytest.mark.parametrize(
    "headers", [{"origin": "https://app.example", "sec-fetch-site": "cross-site"}, {"own": "yes"}, {}]
)
def test_our_own_pages_and_those_of_the_setting_are_served(http: httpx.Client, headers: dict[str, str]) -> None:
    if "own" in headers:
        headers = {"origin": str(http.base_url).rstrip("/"), "sec-fetch-site": "same-origin"}
    assert http.post("/v1/environments/doors/prepare", json={"tasks": []}, headers=headers).status_code != 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None]
)
def test_what_a_form_can_send_is_no_request(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = http.post("/v1/feedback", content=b'{"target": "x"}', headers=headers)
    assert (answer.status_code, code_of(answer)) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"])
def test_json_is_read_by_any_of_its_names(http: httpx.Client, kind: str) -> None:
    answer = http.post("/v1/feedback", content=b'{"target": "none"}', headers={"content-type": kind})
    assert answer.status_code != 415


def test_a_request_without_a_body_needs_no_type(http: httpx.Client) -> None:
    assert http.post("/v1/index/rebuild").status_code == 200
    octets = {"content-type": "application/octet-stream"}  # aiohttp's type for an empty body
    assert http.post("/v1/index/rebuild", headers=octets).status_code == 200
    assert http.delete("/v1/documents/none").status_code == 404


def test_two_hosts_are_one_too_many() -> None:
    with pytest.raises(BadRequest, match="more than one host"):
        checks(ServerConfig())._require_host(Headers(raw=[(b"host", b"localhost"), (b"host", b"evil.example")]))


@pytest.mark.parametrize(
    ("host", "name"),
    [("a.b", "a.b"), ("a.b:80", "a.b"), ("[::1]:80", "::1"), ("[::1]", "::1"), ("127.0.0.1:80", "127.0.0.1"), ("", "")],
)
def test_a_name_is_what_is_before_the_port(host: str, name: str) -> None:
    assert strip_port(host) == name
