"""ASGI middleware that measures every request: duration, route, status, and the trace it belongs to.

Invariant: a route is labelled by its template, never by the path of the request, whose values are unbounded.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.observability.telemetry import UNKNOWN, Telemetry


class RequestMetrics:
    """The outermost ASGI middleware: requests that other middleware rejects are measured too."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # if the application raises before it answers

        async def send_and_keep_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD") else UNKNOWN
        with self._telemetry.request(method) as set_result, self._telemetry.tracing.continue_from(scope["headers"]):
            try:
                await self._app(scope, receive, send_and_keep_status)
            finally:
                # Set by Starlette's router; absent when other middleware rejected the request.
                route = scope.get("route")
                set_result(getattr(route, "path", UNKNOWN), status)
