"""Reads request bodies within limits of size, time and memory.

A body is read completely before the request occupies a slot: a slow client blocks nothing but its own connection.
Invariant: all bodies in memory together stay within a budget, and no tenant uses more than half of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from starlette.types import Message, Receive, Scope

from runtime.api.errors import Overloaded, RequestTimeout, TooLarge
from runtime.api.gateway.request_limits import JsonShapeCheck
from runtime.config import LimitsConfig

BODIES_AT_ONCE = 8
"""The budget in bodies of the maximum size."""
OPEN_BODY_BYTES = 256 * 1024
"""Maximum body of a request without a key: a form with one piece of feedback."""
OPEN_BODY_SECONDS = 10.0
"""Maximum time for such a body to arrive."""
STEP_BYTES = 64 * 1024
"""Bytes checked before the event loop runs other tasks."""


class BodyBudget:
    """Counts the bytes of bodies in memory: in total and for each tenant."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes: Counter[str] = Counter()

    @contextlib.contextmanager
    def open(self, tenant: str) -> Iterator[ReservedBytes]:
        """Yield the counter of one body; its bytes are released at the end of the `with` block."""
        reserved = ReservedBytes(self, tenant)
        try:
            yield reserved
        finally:
            self._num_bytes[tenant] -= reserved.num_bytes
            if not self._num_bytes[tenant]:
                del self._num_bytes[tenant]

    def reserve(self, tenant: str, num_bytes: int) -> None:
        """Count more bytes of a tenant. Raises Overloaded when they exceed the budget or the tenant's half of it."""
        num_own, num_total = self._num_bytes[tenant] + num_bytes, self._num_bytes.total() + num_bytes
        if num_own > self._max_bytes // 2 or num_total > self._max_bytes:
            raise Overloaded("the requests under way hold as much memory as they may: ask again in a moment")
        self._num_bytes[tenant] += num_bytes


class ReservedBytes:
    """The counted bytes of one body."""

    def __init__(self, budget: BodyBudget, tenant: str) -> None:
        self._budget = budget
        self._tenant = tenant
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count more bytes. Raises: Overloaded."""
        self._budget.reserve(self._tenant, num_bytes)
        self.num_bytes += num_bytes


async def read_body(
    scope: Scope,
    receive: Receive,
    limits: LimitsConfig,
    reserved: ReservedBytes,
    *,
    max_bytes: int,
    max_seconds: float,
    is_json: bool,
) -> Receive:
    """Read the body within the limits; return a `receive` that replays it in one piece.

    Raises:
        TooLarge: the declared or actual length exceeds `max_bytes`, or the JSON has too many values.
        BadRequest: the JSON is nested too deeply or is not UTF-8.
        RequestTimeout: the body did not arrive in time.
        Overloaded: the budget for bodies in memory is exhausted.
    """
    headers = {name: value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")}
    declared = int(headers.get(b"content-length", b"0"))  # never raises: uvicorn has rejected malformed numbers
    if not declared and b"transfer-encoding" not in headers:
        return receive
    if declared > max_bytes:
        raise _too_large(declared, max_bytes)
    shape = JsonShapeCheck(limits) if is_json else None
    body = bytearray()
    try:
        async with asyncio.timeout(max_seconds):
            while True:
                message = await receive()
                if message["type"] != "http.request":  # the client disconnected
                    return _replay([message], receive)
                piece = message.get("body", b"")
                if len(body) + len(piece) > max_bytes:
                    raise _too_large(len(body) + len(piece), max_bytes)
                # Before the piece is kept, so that a rejected body releases everything it has reserved.
                reserved.add(len(piece))
                if shape is not None:
                    await _check_in_steps(shape, piece)
                body += piece
                if not message.get("more_body", False):
                    break
    except TimeoutError as error:
        raise RequestTimeout(
            f"the body did not arrive within {max_seconds:g} seconds: send it faster, or less of it"
        ) from error
    # A copy: for a moment the body is in memory twice and counted once.
    return _replay([{"type": "http.request", "body": bytes(body), "more_body": False}], receive)


async def _check_in_steps(shape: JsonShapeCheck, piece: bytes) -> None:
    """Check a piece in steps, so that a large one does not block the event loop."""
    for start in range(0, len(piece), STEP_BYTES):
        shape.check(piece[start : start + STEP_BYTES])
        await asyncio.sleep(0)  # lets other tasks run


def _too_large(num_bytes: int, max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the body has {num_bytes} bytes or more, {max_bytes} are allowed: send less at once", code="body_too_large"
    )


def _replay(messages: Iterable[Message], receive: Receive) -> Receive:
    unread = deque(messages)

    async def replay() -> Message:
        return unread.popleft() if unread else await receive()

    return replay
