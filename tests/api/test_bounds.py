"""How large a request may be: told before it is parsed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.api.bounds import is_deeper
from runtime.config import LimitsConfig
from tests.api.worlds import ServedWorld

LIMITS = LimitsConfig(max_body_bytes=2000, max_json_depth=10, max_messages=4)
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with ServedWorld(tmp_path_factory.mktemp("bounds") / "data") as world:
        world.services.limits = LIMITS
        with httpx.Client(base_url=world.url, trust_env=False, timeout=20) as client:
            yield client


def nest(depth: int) -> bytes:
    return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)


def test_a_body_that_is_too_long_is_refused_as_it_says_and_as_it_turns_out(http: httpx.Client) -> None:
    def piecemeal() -> Iterator[bytes]:
        yield from (b" " * 500 for _ in range(5))

    for content in (b" " * 2001, piecemeal()):
        answer = http.post("/v1/feedback", content=content, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert http.post("/v1/feedback", content=b" " * 2000, headers=JSON).json()["error"]["code"] == "malformed_json"


def test_a_body_in_pieces_arrives_whole(http: httpx.Client) -> None:
    body = json.dumps({"model": "agent", "messages": [{"role": "user", "content": "hello"}]}).encode()
    pieces = (body[start : start + 7] for start in range(0, len(body), 7))
    answer = http.post("/v1/chat/completions", content=pieces, headers=JSON)
    assert answer.json()["choices"][0]["message"]["content"] == "You said: hello"


def test_a_body_that_is_too_deep_is_refused_unparsed(http: httpx.Client) -> None:
    deep, shallow = (http.post("/v1/feedback", content=nest(depth), headers=JSON) for depth in (11, 10))
    assert (deep.status_code, deep.json()["error"]["code"]) == (400, "nested_too_deeply")
    assert shallow.json()["error"]["code"] == "invalid_value"


def test_a_conversation_of_too_many_messages_is_refused_by_name(http: httpx.Client) -> None:
    said = [{"role": "user", "content": "hello"}] * 5
    chat = http.post("/v1/chat/completions", json={"model": "agent", "messages": said})
    response = http.post("/v1/responses", json={"model": "agent", "input": said})
    for answer, field in ((chat, "messages"), (response, "input")):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "too_many_messages", field)
    assert http.post("/v1/chat/completions", json={"model": "agent", "messages": said[:4]}).status_code == 200


def depth_of(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(depth_of, inside), default=0)


VALUES = st.recursive(
    st.text() | st.none() | st.sampled_from(['[["', '\\"[[[', '"}{']),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
)


@given(VALUES, st.integers(min_value=0, max_value=6), st.booleans())
def test_depth_is_what_a_parser_finds(value: object, max_depth: int, is_ascii: bool) -> None:
    body = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    assert is_deeper(body, max_depth) is (depth_of(value) > max_depth)


@pytest.mark.parametrize("unit", [b'"\\', b'"', b"[]", b'"[\\"', b"{"])
def test_measuring_takes_no_longer_on_what_is_made_to_be_slow(unit: bytes) -> None:
    body = (b"[" * 200 + unit * 1_000_000)[:1_000_000]
    started = time.process_time()
    is_deeper(body, 199)
    is_deeper(body, 100_000)
    assert time.process_time() - started < 2.0
