"""The memory that clients without a key can take, measured for the process while their connections are open."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from runtime.api.gateway.request_body import BODIES_AT_ONCE
from runtime.config import LimitsConfig
from tests.runtime.api.worlds import ServedWorld

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

NUM_CLIENTS = 100
NUM_AT_ONCE = 20
PIECE = b"x" * 2**18
BODY_BYTES = 15 * 2**20
HEAD_BYTES = 3 * 10**6
HEADERS = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 200) for number in range(1000))
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SPARE_MB = 40.0
"""Buffers of the connections, and memory that the allocator keeps; 100 bodies would be 1,573 MB."""
BUDGET_MB = BODIES_AT_ONCE * LimitsConfig().max_body_bytes / 2 / 1e6
"""The share of one tenant, here the machine's own user."""


class HeapPeak:
    """The peak growth of this process's heap, in MB."""

    def __init__(self) -> None:
        self.grown_mb = 0.0
        self._stop = threading.Event()

    def __enter__(self) -> HeapPeak:
        self._before = _heap_mb()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.grown_mb = max(self.grown_mb, _heap_mb() - self._before)


def _heap_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ServedWorld]:
    with ServedWorld(tmp_path / "data") as world:
        httpx.get(f"{world.url}/healthz", trust_env=False, timeout=60)
        yield world


def send_from_many(world: ServedWorld, send: Callable[[socket.socket], None]) -> float:
    """Let clients send in parallel and stay connected; return the heap's growth. The server must answer others."""
    host, port = world.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as sockets, ThreadPoolExecutor(NUM_AT_ONCE) as threads, HeapPeak() as peak:

        def attack(_number: int) -> None:
            opened = sockets.enter_context(socket.create_connection((host, int(port)), timeout=60))
            with contextlib.suppress(ConnectionError):  # closed by the server
                send(opened)

        list(threads.map(attack, range(NUM_CLIENTS)))
        assert httpx.get(f"{world.url}/healthz", trust_env=False, timeout=30).status_code == 200
        time.sleep(0.1)  # one more sample of the heap
    return peak.grown_mb


def send_unfinished_body(opened: socket.socket) -> None:
    opened.sendall(POST + b'Content-Length: %d\r\n\r\n"' % (BODY_BYTES + 2))
    for _ in range(BODY_BYTES // len(PIECE)):
        opened.sendall(PIECE)


def send_unfinished_head(opened: socket.socket) -> None:
    opened.sendall(POST)
    for _ in range(HEAD_BYTES // len(HEADERS)):
        opened.sendall(HEADERS)


def test_unfinished_bodies_without_a_key_take_no_memory(world: ServedWorld) -> None:
    httpx.post(
        f"{world.url}/v1/keys", json={"name": "a", "scopes": ["admin"]}, trust_env=False, timeout=60
    ).raise_for_status()
    assert send_from_many(world, send_unfinished_body) < SPARE_MB


def test_unfinished_bodies_take_no_more_than_their_budget_where_no_key_is_needed(world: ServedWorld) -> None:
    grown_mb = send_from_many(world, send_unfinished_body)
    # A growing body may be moved, and is in memory twice then.
    assert BUDGET_MB / 2 < grown_mb < 2 * BUDGET_MB + SPARE_MB


def test_heads_without_an_end_take_no_memory(world: ServedWorld) -> None:
    assert send_from_many(world, send_unfinished_head) < SPARE_MB
