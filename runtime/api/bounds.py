"""How large a request may be, told before anything of it is parsed.

Refuses to know what a request says. A body is read here, whole or up to its limit, and handed on as one piece.
Invariant: what comes through is no longer and no deeper than it may be, so that no parser can be made to overflow.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

from starlette.types import Message, Receive, Scope

from runtime.api.errors import BadRequest, TooLarge
from runtime.config import LimitsConfig

# Possessive, with the closing quote left out if need be: linear also on what is made to be slow.
A_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+', re.DOTALL)
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


async def bound_body(scope: Scope, receive: Receive, limits: LimitsConfig) -> Receive:
    """Return what gives the same body, once it has been seen to keep the limits.

    Raises:
        TooLarge: it is longer than it may be, as it says or as it turns out.
        BadRequest: it is nested deeper than it may be.
    """
    headers = {name: value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")}
    declared = int(headers.get(b"content-length", b"0"))  # uvicorn has refused what is no number
    if not declared and b"transfer-encoding" not in headers:
        return receive
    if declared > limits.max_body_bytes:
        raise _too_large(declared, limits)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the client left in the middle
            return _replay([message], receive)
        body += message.get("body", b"")
        if len(body) > limits.max_body_bytes:
            raise _too_large(len(body), limits)
        if not message.get("more_body", False):
            break
    whole = bytes(body)
    if is_deeper(whole, limits.max_json_depth):
        raise BadRequest(
            f"the body is nested deeper than {limits.max_json_depth} levels: flatten it", code="nested_too_deeply"
        )
    return _replay([{"type": "http.request", "body": whole, "more_body": False}], receive)


def is_deeper(body: bytes, max_depth: int) -> bool:
    """Return whether the lists and objects of a JSON text are nested deeper than that. Nothing is parsed."""
    if body.count(b"[") + body.count(b"{") <= max_depth:  # as in most requests
        return False
    brackets = A_STRING.sub(b"", body).translate(None, NO_BRACKETS)
    depths = itertools.accumulate(STEPS[bracket] for bracket in brackets)
    return any(depth > max_depth for depth in depths)


def _too_large(num_bytes: int, limits: LimitsConfig) -> TooLarge:
    return TooLarge(
        f"the body has {num_bytes} bytes or more, {limits.max_body_bytes} are allowed: send less at once",
        code="body_too_large",
    )


def _replay(messages: Iterable[Message], receive: Receive) -> Receive:
    held: list[Any] = list(messages)

    async def replayed() -> Message:
        return held.pop(0) if held else await receive()

    return replayed
