"""Reading the body of a request, within limits of size, time and memory.

A body is read whole before the request takes part in anything: a client that sends slowly holds nothing but its own
connection. Invariant: the bodies held in memory at once, of all clients together, stay within a budget, and no tenant
uses more than half of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.types import Message, Receive, Scope

from runtime.api.errors import Overloaded, RequestTimeout, TooLarge
from runtime.api.gateway.request_limits import JsonShape
from runtime.config import LimitsConfig

BODIES_AT_ONCE = 8
"""Bodies of the largest size that are held in memory at the same time."""
OPEN_BODY_BYTES = 256 * 1024
"""The longest body of a request that nobody answers for: a form with one piece of feedback."""
STEP_BYTES = 64 * 1024
"""How much of a body is looked at before the others have their turn."""


class BodyBudget:
    """Bytes of bodies in memory: of all clients, and of each tenant."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()

    @contextlib.contextmanager
    def open(self, tenant: str) -> Iterator[ReservedBytes]:
        """Give what counts the bytes of one body, until its request is answered."""
        held = ReservedBytes(self, tenant)
        try:
            yield held
        finally:
            self._held[tenant] -= held.num_bytes
            if not self._held[tenant]:
                del self._held[tenant]

    def take(self, tenant: str, num_bytes: int) -> None:
        """Raise Overloaded unless there is room for so many bytes more."""
        if self._held[tenant] + num_bytes > self._max_bytes // 2 or self._held.total() + num_bytes > self._max_bytes:
            raise Overloaded("the requests under way hold as much memory as they may: ask again in a moment")
        self._held[tenant] += num_bytes


class ReservedBytes:
    """The bytes of one body."""

    def __init__(self, budget: BodyBudget, tenant: str) -> None:
        self._budget = budget
        self._tenant = tenant
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count more bytes. Raises: Overloaded."""
        self._budget.take(self._tenant, num_bytes)
        self.num_bytes += num_bytes


async def read_body(
    scope: Scope, receive: Receive, limits: LimitsConfig, held: ReservedBytes, *, max_bytes: int, is_json: bool
) -> Receive:
    """Return what gives the same body in one piece, once it is here and has been seen to keep the limits.

    Raises:
        TooLarge: it is longer than it may be, as it says or as it turns out, or holds too many values.
        BadRequest: it is nested deeper than it may be, or is no UTF-8.
        RequestTimeout: it was not here in time.
        Overloaded: the bodies of others take all the memory there is for them.
    """
    headers = {name: value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")}
    declared = int(headers.get(b"content-length", b"0"))  # uvicorn has refused what is no number
    if not declared and b"transfer-encoding" not in headers:
        return receive
    if declared > max_bytes:
        raise _too_large(declared, max_bytes)
    shape = JsonShape(limits) if is_json else None
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] != "http.request":  # the client left in the middle
                    return _replay([message], receive)
                piece = message.get("body", b"")
                if len(body) + len(piece) > max_bytes:
                    raise _too_large(len(body) + len(piece), max_bytes)
                held.add(len(piece))
                if shape is not None:
                    await _look_at(shape, piece)
                body += piece
                if not message.get("more_body", False):
                    break
    except TimeoutError as error:
        raise RequestTimeout(
            f"the body was not here within {limits.body_seconds:g} seconds: send it faster, or less of it"
        ) from error
    return _replay([{"type": "http.request", "body": bytes(body), "more_body": False}], receive)


async def _look_at(shape: JsonShape, piece: bytes) -> None:
    """Look at a piece in steps, with the others having their turn between them."""
    for start in range(0, len(piece), STEP_BYTES):
        shape.feed(piece[start : start + STEP_BYTES])
        await asyncio.sleep(0)


def _too_large(num_bytes: int, max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the body has {num_bytes} bytes or more, {max_bytes} are allowed: send less at once", code="body_too_large"
    )


def _replay(messages: Iterable[Message], receive: Receive) -> Receive:
    waiting: list[Any] = list(messages)

    async def replayed() -> Message:
        return waiting.pop(0) if waiting else await receive()

    return replayed
