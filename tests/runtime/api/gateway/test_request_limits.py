"""Limits on a request's size are enforced before it is parsed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.api.errors import ApiError
from runtime.api.gateway.request_limits import JsonShapeCheck
from runtime.config import LimitsConfig
from tests.runtime.api.worlds import ServedWorld

LIMITS = LimitsConfig(max_body_bytes=2000, max_json_depth=10, max_messages=4, max_json_values=400)
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


def count_of(value: object) -> int:
    """Count the values, with lists and objects; an empty list or object counts as two."""
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + sum(map(count_of, inside)) + (isinstance(value, dict | list) and not inside)


def refusal_of(pieces: Iterable[bytes], **limits: int) -> str | None:
    """Return the code with which a body in these pieces is refused."""
    shape = JsonShapeCheck(LimitsConfig(**{"max_json_depth": 1000, "max_json_values": 10**9, **limits}))
    try:
        for piece in pieces:
            shape.check(piece)
    except ApiError as refusal:
        return refusal.code
    return None


@given(VALUES, st.integers(min_value=1, max_value=6), st.booleans(), st.integers(min_value=1, max_value=9))
def test_depth_and_number_of_values_are_what_a_parser_finds(
    value: object, limit: int, is_ascii: bool, piece_bytes: int
) -> None:
    body = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    pieces = [body[start : start + piece_bytes] for start in range(0, len(body), piece_bytes)]
    is_deep, is_many = depth_of(value) > limit, count_of(value) > limit
    assert refusal_of(pieces, max_json_depth=limit) == ("nested_too_deeply" if is_deep else None)
    assert refusal_of(pieces, max_json_values=limit) == ("too_many_values" if is_many else None)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_body_in_another_encoding_is_refused_unparsed(http: httpx.Client, encoding: str) -> None:
    body = json.dumps({"model": "agent", "messages": [{"role": "user", "content": "∢" + "[" * 50}]}, ensure_ascii=False)
    answer = http.post("/v1/chat/completions", content=body.encode(encoding), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_json")


@pytest.mark.parametrize("unit", [b'"\\', b'"', b"[]", b'"[\\"', b"{", b'\\"'])
def test_measuring_takes_no_longer_on_what_is_made_to_be_slow(unit: bytes) -> None:
    body = (b"[" * 200 + unit * 1_000_000)[:1_000_000]
    started = time.process_time()
    refusal_of([body], max_json_depth=10**6)
    refusal_of(body[start : start + 65_536] for start in range(0, len(body), 65_536))
    refusal_of(body[start : start + 100] for start in range(0, len(body), 100))
    assert time.process_time() - started < 3.0


def test_more_values_than_a_parser_takes_in_a_moment_are_refused_unparsed(http: httpx.Client) -> None:
    body = b'{"model": "agent", "messages": [' + b"0," * 500 + b"0]}"
    answer = http.post("/v1/chat/completions", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_values")
