"""What every request passes first: who asks, may they, not too often, not too much.

Refuses to know what a request is about: it looks at the path, two headers and the size. Everything is refused before
the body is read but its own size and depth, and places that were taken meanwhile.
Flow: key -> door -> room -> quota -> body -> place -> the application, with `request.state.caller` set.

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
from runtime.api.errors import SHED, ApiError, InMaintenance, Unauthorized, respond
from runtime.api.gateway.admission import TURNS, ConcurrencyLimit
from runtime.api.gateway.permissions import OPERATOR, Caller, is_open, require_open
from runtime.api.gateway.quota import Quota
from runtime.api.gateway.request_body import BODIES_AT_ONCE, OPEN_BODY_BYTES, BodyBudget, read_body
from runtime.api.services import Services
from runtime.errors import EngineInMaintenance

NO_JSON = (b"multipart/form-data", b"application/x-www-form-urlencoded")
"""What some routes read besides JSON. A body of any other type is looked at as if it were JSON."""


class AuthMiddleware:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, services: Services, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._services = services
        self._routes = routes
        self._callers: dict[str, Caller] = {}
        """By the key's id: a caller keeps its quota from request to request."""
        self._room = ConcurrencyLimit(services.engine.config.max_turns)
        self._budget = BodyBudget(BODIES_AT_ONCE * services.limits.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        with contextlib.ExitStack() as held:
            try:
                caller = None if is_open(scope["path"]) else self._identify(scope)
                is_turn = caller is not None and self._admit(caller, scope)
                receive = await self._read(caller, held, scope, receive)
                if caller is not None and is_turn:
                    held.enter_context(self._take_place(caller))
            except ApiError as refusal:
                return await self._refuse(refusal, scope, receive, send)
            scope.setdefault("state", {})["caller"] = caller
            try:
                await self._app(scope, receive, send)
            finally:
                if caller is not None and caller.key is not None:
                    with contextlib.suppress(StoreError):  # when a key was last used is worth no failure
                        await self._services.memory.keys.note_use(caller.key)

    async def _read(self, caller: Caller | None, held: contextlib.ExitStack, scope: Scope, receive: Receive) -> Receive:
        """Return what gives the body, whose memory is counted as long as `held` holds it.

        Raises: TooLarge, BadRequest, RequestTimeout, Overloaded.
        """
        limits = self._services.limits
        max_bytes = limits.max_body_bytes if caller is not None else min(limits.max_body_bytes, OPEN_BODY_BYTES)
        body = held.enter_context(self._budget.open("" if caller is None else f"tenant {caller.tenant}"))
        kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        is_json = not kind.lower().startswith(NO_JSON)
        return await read_body(scope, receive, limits, body, max_bytes=max_bytes, is_json=is_json)

    async def _refuse(self, refusal: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal.status in SHED:
            self._services.agent.telemetry.shed(refusal.code or refusal.type)
        await respond(refusal)(scope, receive, send)

    def _admit(self, caller: Caller, scope: Scope) -> bool:
        """Count the request, and return whether it is a turn, which needs a place once its body is here.

        Raises: Forbidden, InMaintenance, Overloaded, TooManyRequests.
        """
        path = self._template_of(scope)
        if path is not None:  # else it is the router's to say that there is nothing
            require_open(caller, scope["method"], path)
        is_turn = (scope["method"], path) in TURNS
        if is_turn:
            self._require_serving()
            self._room.require(caller.tenant)  # who is turned away has used nothing of its quota
        caller.quota.admit()
        return is_turn

    def _take_place(self, caller: Caller) -> AbstractContextManager[None]:
        """Return the place of a turn whose body is here. Raises: Overloaded, InMaintenance."""
        try:
            self._require_serving()
            self._room.require(caller.tenant)
        except ApiError:
            caller.quota.give_back()
            raise
        return self._room.take(caller.tenant)

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
