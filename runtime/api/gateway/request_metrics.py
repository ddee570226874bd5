"""Every request measured on its way through, whatever answers it.

Refuses to know what a request is about. A route is named by its template: what clients put into a path is no label.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.observability.telemetry import UNKNOWN, Telemetry


class RequestMetrics:
    """ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD") else UNKNOWN
        with self._telemetry.request(method) as answer, self._telemetry.tracing.continue_from(scope["headers"]):
            try:
                await self._app(scope, receive, send_and_note)
            finally:
                route = scope.get("route")
                answer(getattr(route, "path", UNKNOWN), status)
