"""Limits each HTTP connection before its client is authenticated: size of the head, idle time, number.

uvicorn bounds neither the length of a request's head nor the time it takes to arrive, and buffers it in memory.
Invariants: an idle connection is closed in time; the number of connections is bounded, and one that waits for its
client is closed in favour of a new one, never one whose request is being answered.
Hazard: the class overrides uvicorn's protocol, whose attributes (`cycle`, `pipeline`) are not a public interface.
"""

from __future__ import annotations

import json
import time
from asyncio import TimerHandle, Transport
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from runtime.api.errors import ApiError, BadRequest, HeadTooLarge, Overloaded, RequestTimeout, error_body
from runtime.config import LimitsConfig

MAX_HEAD_BYTES = 64 * 1024
"""Maximum size of the request line and headers together."""
HEAD_SECONDS = 15.0
"""Maximum time from the opening of a connection to the end of its first head, and for any other head to arrive."""
KEEP_ALIVE_SECONDS = 75
"""Maximum time from an answer to the beginning of the next head. Hazard: a client that would reuse a connection for as
long as this loses a request now and then, which crosses the closing on its way. httpx reuses one for 5 s, aiohttp for
15 s, load balancers for 60 s."""
FRESH_SECONDS = 1.0
"""A connection that has been idle no longer than this may have sent a head that is still on its way."""
UNREAD_SECONDS = 60.0
"""Maximum time for which a client may leave sent data unread."""


def server_config(app: ASGIApp, limits: LimitsConfig, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for connections within `limits`; `options` go to `uvicorn.Config`."""

    class ConfiguredConnection(BoundedConnection):
        max_connections = limits.max_connections

    # No access log: paths hold the tokens of feedback links. No WebSockets: nothing authenticates them.
    return uvicorn.Config(
        app,
        http=ConfiguredConnection,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        **options,
    )


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection with the limits of this module."""

    max_connections = 1024
    head_seconds = HEAD_SECONDS
    keep_alive_seconds = float(KEEP_ALIVE_SECONDS)
    unread_seconds = UNREAD_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.idle_since: float | None = None
        """Monotonic time since which the next head is waited for; None from its end to the end of the answer."""
        self._body_since = 0.0
        """Monotonic time of the last head's end, since which its body is waited for."""
        self._error: ApiError | None = None
        self._is_in_head = False
        self._num_head_bytes = 0
        self._num_unparsed_bytes = 0
        """Bytes received since the parser's last callback: it may be buffering all of them."""
        self._head_deadline: TimerHandle | None = None
        self._unread_deadline: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        super().connection_made(transport)
        self._wait_for_head(self.head_seconds)
        if len(self.connections) > self.max_connections:
            now = time.monotonic()
            connections = [it for it in self.connections if isinstance(it, BoundedConnection)]
            # Never empty: this new connection is idle itself.
            ranks = [(rank, it) for it in connections if (rank := it._eviction_rank(now)) is not None]
            _, first = min(ranks, key=lambda pair: pair[0])
            first.close_with(Overloaded("there are too many connections: ask again in a moment"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        # Also cancels the deadline for unread data.
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        # Before the parser runs: its callbacks reset the count.
        self._num_unparsed_bytes += len(data)
        super().data_received(data)
        if self._num_unparsed_bytes > MAX_HEAD_BYTES:
            self.close_with(_head_too_large())

    def on_message_begin(self) -> None:
        self._num_head_bytes = 0
        self._is_in_head = True
        if self.cycle is not None and self.idle_since is not None:  # between two requests
            self._wait_for_head(self.head_seconds)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:  # also for the trailers of a chunked body
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_unparsed_bytes = 0
        self._is_in_head = False
        self._stop_waiting()
        self._body_since = time.monotonic()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_unparsed_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        # Read before uvicorn's own handler, which takes the next pipelined request from the queue.
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and not self.transport.is_closing():
            # in a head already: the next request followed before this one's answer
            self._wait_for_head(self.head_seconds if self._is_in_head else self.keep_alive_seconds)

    def pause_writing(self) -> None:
        super().pause_writing()
        # uvicorn 0.54 lets an answer wait for such a client without a limit.
        self._unread_deadline = self.loop.call_later(self.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread_deadline is not None:
            self._unread_deadline.cancel()
            self._unread_deadline = None
        super().resume_writing()

    def close_with(self, error: ApiError) -> None:
        """Close the connection, with `error` as the answer where the client waits for one."""
        self._error = error
        # `close` takes effect later; until then the same connection must not be chosen again.
        self.connections.discard(self)
        is_body_awaited = self._is_body_awaited
        # Abort, not close: `close` would first flush data that the client does not read.
        if self.idle_since is None and (not is_body_awaited or self.transport.get_write_buffer_size() > 0):
            self.transport.abort()
        elif is_body_awaited or self._is_in_head or self.cycle is None:
            self.send_400_response(str(error))
        else:  # between two requests, or after an answer that did not wait for the body
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Send the error and close. uvicorn calls this method, by this name, for data that is not HTTP."""
        error = self._error or BadRequest(msg, code="invalid_http")
        body = json.dumps(error_body(error)).encode()
        head = [
            STATUS_LINE[error.status],
            b"content-type: application/json\r\n",
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body),
        ]
        if not self.transport.is_closing():
            self.transport.write(b"".join([*head, body]))
            self.transport.close()

    @property
    def _is_body_awaited(self) -> bool:
        """Whether the rest of a body is all that is waited for: its request has no slot, and no answer, yet."""
        cycle = self.cycle
        # Requests in the pipeline wait for one that is being answered.
        return cycle is not None and not self.pipeline and cycle.more_body and not cycle.response_started

    def _eviction_rank(self, now: float) -> tuple[int, float] | None:
        """Return the connection's rank among those that may be closed for a new one, lowest first; None if it may not.

        First the connections that are idle, then those whose body is arriving, then those that may be idle because the
        head is on its way; of each kind the one that has waited longest.
        """
        if self.idle_since is not None:
            return (2 if now - self.idle_since < FRESH_SECONDS else 0), self.idle_since
        return (1, self._body_since) if self._is_body_awaited else None

    def _count(self, num_bytes: int) -> None:
        """Count bytes of a head. uvicorn catches any exception from here and calls `send_400_response`."""
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._error = _head_too_large()
            raise self._error

    def _wait_for_head(self, seconds: float) -> None:
        self._stop_waiting()
        self.idle_since = time.monotonic()
        self._head_deadline = self.loop.call_later(seconds, self._close_late)

    def _stop_waiting(self) -> None:
        self.idle_since = None
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _close_late(self) -> None:
        message = f"the request did not arrive within {self.head_seconds:g} seconds: send it faster"
        self.close_with(RequestTimeout(message))


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the headers have more than {MAX_HEAD_BYTES} bytes: send fewer", code="headers_too_large")
