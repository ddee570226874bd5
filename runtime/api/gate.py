"""What every request passes first: who asks, may they, not too often, not too much.

Refuses to know what a request is about: it looks at the path, one header and the size. Everything is refused before the
body is read but its own size and depth.
Flow: key -> door -> room -> quota -> body -> the application, with `request.state.caller` set.

Invariants: where keys are required nothing but the open paths is answered without one; a missing, an unknown and a
revoked key get the same answer, after the same work; who is let in for a turn holds a place until it is answered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from memory.errors import StoreError
from memory.schema import ApiKey
from runtime.api.access import OPERATOR, Caller, is_open, require_open
from runtime.api.admission import TURNS, Room
from runtime.api.bounds import bound_body
from runtime.api.errors import SHED, ApiError, InMaintenance, Unauthorized, respond
from runtime.api.quota import Quota
from runtime.api.services import Services
from runtime.errors import EngineInMaintenance


class Gate:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, services: Services, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._services = services
        self._routes = routes
        self._callers: dict[str, Caller] = {}
        """By the key's id: a caller keeps its quota from request to request."""
        self._room = Room(services.engine.config.max_turns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if is_open(scope["path"]):
            return await self._pass_on(None, scope, receive, send)
        try:
            caller = self._identify(scope)
            place = self._admit(caller, scope)
        except ApiError as refusal:
            return await self._refuse(refusal, scope, receive, send)
        with place:
            try:
                await self._pass_on(caller, scope, receive, send)
            finally:
                if caller.key is not None:
                    with contextlib.suppress(StoreError):  # when a key was last used is worth no failure
                        await self._services.memory.keys.note_use(caller.key)

    async def _pass_on(self, caller: Caller | None, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            receive = await bound_body(scope, receive, self._services.limits)
        except ApiError as refusal:
            return await self._refuse(refusal, scope, receive, send)
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)

    async def _refuse(self, refusal: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal.status in SHED:
            self._services.agent.telemetry.shed(refusal.code or refusal.type)
        await respond(refusal)(scope, receive, send)

    def _admit(self, caller: Caller, scope: Scope) -> AbstractContextManager[None]:
        """Return the place that the request holds.

        Raises: Forbidden, InMaintenance, Overloaded, TooManyRequests.
        """
        path = self._template_of(scope)
        if path is not None:  # else it is the router's to say that there is nothing
            require_open(caller, scope["method"], path)
        is_turn = (scope["method"], path) in TURNS
        if is_turn:
            self._require_serving()
            self._room.require()  # who is turned away has used nothing of its quota
        caller.quota.admit()
        return self._room.take() if is_turn else contextlib.nullcontext()

    def _require_serving(self) -> None:
        try:
            self._services.require_serving()
        except EngineInMaintenance as closed:
            raise InMaintenance(str(closed)) from None

    def _identify(self, scope: Scope) -> Caller:
        keys = self._services.memory.keys
        if not keys.is_required:
            return OPERATOR
        presented = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = presented.decode("latin-1").partition(" ")
        row = keys.find(token.strip())
        if row is None or scheme.lower() != "bearer":
            raise Unauthorized(
                "no valid API key: send `Authorization: Bearer <key>` with a key of this server", code="invalid_api_key"
            )
        return self._caller_for(row)

    def _caller_for(self, row: ApiKey) -> Caller:
        if row.id not in self._callers:
            quota = Quota(row.requests_per_minute, row.tokens_per_minute)
            self._callers[row.id] = Caller(row.tenant, frozenset(row.scopes), quota, row)
        return self._callers[row.id]

    def _template_of(self, scope: Scope) -> str | None:
        """Return the path of the route that will answer, as it was declared."""
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return getattr(route, "path", "")
        return None
