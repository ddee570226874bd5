"""One connection of a client, within limits that hold before anybody knows who it is.

uvicorn bounds neither the length of a request's head nor how long it takes to arrive, and keeps what came of it in
memory. Invariants: a connection that no request is being answered on ends in time; there are only so many of them, and
one that waits makes room for a new one.
"""

from __future__ import annotations

import json
import time
from asyncio import BaseTransport, TimerHandle
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from runtime.api.errors import ApiError, BadRequest, HeadTooLarge, Overloaded, RequestTimeout, error_body
from runtime.config import LimitsConfig

MAX_HEAD_BYTES = 64 * 1024
"""The longest request line and headers."""
HEAD_SECONDS = 15.0
"""The longest time from a connection, or from the last answer on it, to the end of the next head."""
UNREAD_SECONDS = 60.0
"""How long a client may leave what was sent to it unread."""


def server_config(app: ASGIApp, limits: LimitsConfig, **more: Any) -> uvicorn.Config:
    """Return uvicorn's configuration of a server whose connections keep the limits."""

    class Bounded(BoundedConnection):
        max_connections = limits.max_connections

    # Nothing here speaks WebSocket.
    return uvicorn.Config(app, http=Bounded, ws="none", log_config=None, access_log=False, **more)


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, with bounds."""

    max_connections = 1024
    head_seconds = HEAD_SECONDS
    unread_seconds = UNREAD_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waits_since: float | None = None
        """Since when nothing is being answered on it."""
        self._refusal: ApiError | None = None
        self._is_in_head = False
        self._num_head_bytes = 0
        self._num_unparsed_bytes = 0
        """That came since the parser told of anything: they are in its memory, or nobody's."""
        self._head_deadline: TimerHandle | None = None
        self._unread_deadline: TimerHandle | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self.max_connections:
            waiting = [it for it in self.connections if it.waits_since is not None]
            longest = min(waiting, key=lambda it: it.waits_since)  # at least this one waits
            longest.refuse(Overloaded("there are too many connections: ask again in a moment"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._num_unparsed_bytes += len(data)
        super().data_received(data)
        if self._num_unparsed_bytes > MAX_HEAD_BYTES:
            self.refuse(_head_too_large())

    def on_message_begin(self) -> None:
        self._num_head_bytes = 0
        self._is_in_head = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:  # the headers behind a body in chunks, too
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_unparsed_bytes = 0
        self._is_in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_unparsed_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and not self.transport.is_closing():
            self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_deadline = self.loop.call_later(self.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread_deadline is not None:
            self._unread_deadline.cancel()
            self._unread_deadline = None
        super().resume_writing()

    def refuse(self, refusal: ApiError) -> None:
        """Say why, if an answer is due, and end the connection."""
        self._refusal = refusal
        self.connections.discard(self)  # it ends in a moment; until then it must not be chosen again
        if self.waits_since is None:
            self.transport.abort()
        elif self._is_in_head or self.cycle is None:
            self.send_400_response(str(refusal))
        else:  # between two requests, or behind an answer that did not wait for the body
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Send the refusal; by this name uvicorn calls it for what is no HTTP."""
        refusal = self._refusal or BadRequest(msg, code="invalid_http")
        body = json.dumps(error_body(refusal)).encode()
        head = [
            STATUS_LINE[refusal.status],
            b"content-type: application/json\r\n",
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body),
        ]
        if not self.transport.is_closing():
            self.transport.write(b"".join([*head, body]))
            self.transport.close()

    def _count(self, num_bytes: int) -> None:
        """Count bytes of a head. What is raised here, uvicorn turns into a call of `send_400_response`."""
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            raise self._refusal

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self.waits_since = time.monotonic()
        self._head_deadline = self.loop.call_later(self.head_seconds, self._end_waiting)

    def _stop_waiting(self) -> None:
        self.waits_since = None
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _end_waiting(self) -> None:
        self.refuse(RequestTimeout(f"the request was not here within {self.head_seconds:g} seconds: send it faster"))


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the headers have more than {MAX_HEAD_BYTES} bytes: send fewer", code="headers_too_large")
