"""Clients that send slowly, endlessly or nothing, over raw sockets: limited before they are authenticated."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from runtime.api.gateway import auth, connections
from runtime.api.services import Services
from runtime.config import LimitsConfig
from tests.runtime.api.worlds import ServedWorld
from tests.support.waiting import eventually

LIMITS = LimitsConfig(body_seconds=1.0, max_connections=12, max_body_bytes=400_000)
POST = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def use(services: Services) -> None:
    services.limits = LIMITS


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedWorld]:
    monkeypatch.setattr(connections.BoundedConnection, "head_seconds", 1.0)
    monkeypatch.setattr(connections.BoundedConnection, "keep_alive_seconds", 3.0)
    with ServedWorld(tmp_path / "data", change=use) as world:
        yield world


@pytest.fixture
def sockets(world: ServedWorld) -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def connect(world: ServedWorld, sockets: contextlib.ExitStack, head: bytes = b"") -> socket.socket:
    host, port = world.url.removeprefix("http://").split(":")
    opened = sockets.enter_context(socket.create_connection((host, int(port)), timeout=10))
    opened.sendall(head)
    return opened


def read(opened: socket.socket) -> tuple[int, str]:
    """Return the status and code of a refusal, once the server has closed the connection; 0 without an answer."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := opened.recv(65_536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)["error"]["code"]) if answer else (0, "")


def send_until_refused(opened: socket.socket, piece: bytes, max_bytes: int = 50_000_000) -> int:
    """Send a piece repeatedly; return the bytes sent until the server closed the connection."""
    num = 0
    with contextlib.suppress(ConnectionError, TimeoutError):
        while num < max_bytes:
            opened.sendall(piece)
            num += len(piece)
    return num


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", b"X-Many: " + b"y" * 1000 + b"\r\n"),
        (b"GET /healthz HTTP/1.1\r\nX-Long: ", b"y" * 10_000),
        (b"GET /", b"y" * 10_000),
        (POST % b"/v1/feedback" + b"Transfer-Encoding: chunked\r\n\r\n1;", b"extension" * 1000),
        (POST % b"/v1/feedback" + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Trailer: " + b"y" * 1000 + b"\r\n"),
    ],
)
def test_a_head_without_an_end_is_cut_off(
    world: ServedWorld, sockets: contextlib.ExitStack, head: bytes, piece: bytes
) -> None:
    opened = connect(world, sockets, head)
    # The limit, and the sockets' buffers.
    assert send_until_refused(opened, piece) < 20_000_000
    assert httpx.get(f"{world.url}/healthz", trust_env=False, timeout=60).status_code == 200


def test_a_head_that_is_complete_but_too_long_is_refused(world: ServedWorld, sockets: contextlib.ExitStack) -> None:
    many = b"".join(b"X-%d: y\r\n" % at for at in range(10_000))
    opened = connect(world, sockets, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")
    assert read(opened) == (431, "headers_too_large")


def test_a_connection_that_was_answered_is_not_kept_for_ever(world: ServedWorld, sockets: contextlib.ExitStack) -> None:
    opened = connect(world, sockets, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    began, answer = time.monotonic(), b""
    while piece := opened.recv(65_536):
        answer += piece
    assert answer.count(b"HTTP/1.1 ") == 1
    assert time.monotonic() - began < 8


def test_a_connection_that_was_answered_may_be_reused_after_longer_than_a_first_head_may_take(
    world: ServedWorld, sockets: contextlib.ExitStack
) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    opened = connect(world, sockets)
    for seconds in (1.5, 0.0):
        answer = b""
        opened.sendall(request)
        while not answer.endswith(b"}"):
            answer += opened.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 200")
        time.sleep(seconds)

    opened.sendall(request[:10])
    began = time.monotonic()
    assert read(opened) == (408, "request_timeout")
    assert time.monotonic() - began < 2.5  # and not as long as an idle connection is kept


def test_connections_are_kept_longer_than_clients_reuse_them(world: ServedWorld) -> None:
    config = connections.server_config(lambda *_: None, LIMITS)  # type: ignore[arg-type]
    assert config.timeout_keep_alive == connections.KEEP_ALIVE_SECONDS > 60


@pytest.mark.parametrize("head", [b"", b"GET /healthz HTTP/1.1\r\nHost: loc", b"GET"])
def test_a_head_that_does_not_come_is_not_waited_for(
    world: ServedWorld, sockets: contextlib.ExitStack, head: bytes
) -> None:
    opened = connect(world, sockets, head)
    began = time.monotonic()
    assert read(opened) == (408, "request_timeout")
    assert time.monotonic() - began < 8


def test_a_dripped_head_gets_no_more_time(world: ServedWorld, sockets: contextlib.ExitStack) -> None:
    opened = connect(world, sockets, b"GET /healthz HTTP/1.1\r\nX-Slow: ")
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 10:
            opened.sendall(b"y")
            time.sleep(0.05)
    assert time.monotonic() - began < 8


def test_a_dripped_body_is_not_waited_for_and_holds_no_place(world: ServedWorld, sockets: contextlib.ExitStack) -> None:
    """More such requests than the engine has slots, and all but two of the permitted connections."""
    world.services.engine.config.max_num_seqs = 1
    head = POST % b"/v1/chat/completions" + b"Content-Length: 1000\r\n\r\n{"
    dripping = [connect(world, sockets, head) for _ in range(10)]
    hello = {"model": "agent", "messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"{world.url}/v1/chat/completions", json=hello, trust_env=False, timeout=20)
    assert answer.status_code == 200
    assert {read(opened) for opened in dripping} == {(408, "request_timeout")}


def test_connections_that_wait_make_room_for_new_ones(world: ServedWorld, sockets: contextlib.ExitStack) -> None:
    for _ in range(30):
        connect(world, sockets, b"GET ")
    assert httpx.get(f"{world.url}/healthz", trust_env=False, timeout=20).status_code == 200
    assert len(world.server.server_state.connections) <= LIMITS.max_connections


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/feedback/x"])
def test_connections_whose_bodies_drip_make_room_for_new_ones(
    world: ServedWorld, sockets: contextlib.ExitStack, path: bytes
) -> None:
    world.services.limits = LIMITS.model_copy(update={"body_seconds": 60.0})
    head = POST % path + b"Content-Length: 1000\r\n\r\n{"
    first = connect(world, sockets, head)
    assert eventually(lambda: num_arriving(world) == 1)
    for _ in range(LIMITS.max_connections - 1):
        connect(world, sockets, head)
    assert eventually(lambda: num_arriving(world) == LIMITS.max_connections)
    hello = {"model": "agent", "messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"{world.url}/v1/chat/completions", json=hello, trust_env=False, timeout=20)
    assert answer.status_code == 200
    assert num_arriving(world) == LIMITS.max_connections - 1
    assert read(first) in ((503, "engine_overloaded"), (0, ""))  # a reset may overtake the answer


def test_clients_that_connect_at_the_same_time_do_not_displace_each_other(
    world: ServedWorld, sockets: contextlib.ExitStack
) -> None:
    world.services.limits = LIMITS.model_copy(update={"body_seconds": 60.0})
    head = POST % b"/v1/chat/completions" + b"Content-Length: 1000\r\n\r\n{"
    for _ in range(LIMITS.max_connections):
        connect(world, sockets, head)
    assert eventually(lambda: num_arriving(world) == LIMITS.max_connections)
    together = [connect(world, sockets) for _ in range(6)]
    for opened in together:
        opened.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert [opened.recv(12) for opened in together] == [b"HTTP/1.1 200"] * 6


def test_a_request_that_is_being_answered_is_not_closed_for_a_new_one(
    world: ServedWorld, sockets: contextlib.ExitStack
) -> None:
    body = json.dumps({"model": "agent", "messages": [{"role": "user", "content": "wait"}]}).encode()
    head = POST % b"/v1/chat/completions" + b"Content-Length: %d\r\n\r\n" % len(body)
    # Behind the first, part of a second one: its body is late, and the first is still being answered.
    begun = POST % b"/v1/chat/completions" + b"Content-Length: 1000\r\n\r\n{"
    asking = [connect(world, sockets, head + body + begun) for _ in range(LIMITS.max_connections)]
    assert eventually(lambda: len(world.engine.calls) == LIMITS.max_connections)
    assert read(connect(world, sockets)) == (503, "engine_overloaded")
    for opened in asking:
        opened.setblocking(False)
        with pytest.raises(BlockingIOError):
            opened.recv(1)


def test_a_body_without_a_key_gets_less_time(
    world: ServedWorld, sockets: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "OPEN_BODY_SECONDS", 0.5)
    world.services.limits = LIMITS.model_copy(update={"body_seconds": 60.0})
    opened = connect(world, sockets, POST % b"/feedback/x" + b"Content-Length: 1000\r\n\r\n{")
    opened.settimeout(20)
    assert read(opened) == (408, "request_timeout")


def num_arriving(world: ServedWorld) -> int:
    """Return the number of connections on which part of a body has arrived."""
    return sum(it.cycle is not None and it.cycle.more_body for it in [*world.server.server_state.connections])


def test_bodies_that_nobody_asked_for_are_not_kept(world: ServedWorld, sockets: contextlib.ExitStack) -> None:
    """If keys are required, a request without one is refused before its body is read."""
    httpx.post(
        f"{world.url}/v1/keys", json={"name": "a", "scopes": ["admin"]}, trust_env=False, timeout=60
    ).raise_for_status()
    opened = connect(world, sockets, POST % b"/v1/chat/completions" + b"Content-Length: 300000\r\n\r\n")
    opened.settimeout(5)
    assert opened.recv(12) == b"HTTP/1.1 401"
    big = connect(world, sockets, POST % b"/feedback/x" + b"Content-Length: 300000\r\n\r\n")
    big.settimeout(5)
    assert big.recv(12) == b"HTTP/1.1 413"


def test_bodies_together_hold_only_so_much_memory(world: ServedWorld, sockets: contextlib.ExitStack) -> None:
    """The budget is eight of the largest bodies, of which a single tenant gets half."""
    head = POST % b"/v1/chat/completions" + b"Content-Length: 399999\r\n\r\n"
    opened = [connect(world, sockets, head + b'"' + b"x" * 399_000) for _ in range(7)]
    told = sorted(read(each) for each in opened)
    assert told.count((503, "engine_overloaded")) == 3
    assert told.count((408, "request_timeout")) == 4
    assert eventually(lambda: not world.server.server_state.tasks)
