"""ASGI middleware that authenticates, authorizes and limits every request before its route runs.

Order: API key -> permission -> capacity -> quota -> body -> slot -> application, with `request.state.caller` set. All
rejections happen before the body is read, except those for the body's own size and depth and for slots that were
occupied while it arrived.
Invariants: where keys are required, only the open paths are answered without one. A missing, an unknown and a revoked
key get the same answer after the same work, so that timing reveals nothing. A turn occupies its slot until its answer
has been sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from memory.errors import StoreError
from memory.schema import ApiKey
from runtime.api.errors import LOAD_STATUSES, ApiError, InMaintenance, Unauthorized, error_response
from runtime.api.gateway.admission import TURNS, ConcurrencyLimit
from runtime.api.gateway.permissions import OPERATOR, Caller, is_open, require_permission
from runtime.api.gateway.quota import Quota
from runtime.api.gateway.request_body import BODIES_AT_ONCE, OPEN_BODY_BYTES, OPEN_BODY_SECONDS, BodyBudget, read_body
from runtime.api.services import Services
from runtime.errors import EngineInMaintenance

FORM_TYPES = (b"multipart/form-data", b"application/x-www-form-urlencoded")
"""Content types that some routes read besides JSON. A body of any other type is checked as if it were JSON."""


class AuthMiddleware:
    """ASGI middleware directly around the routes, inside the origin check and the request metrics."""

    def __init__(self, app: ASGIApp, services: Services, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._services = services
        self._routes = routes
        self._callers: dict[str, Caller] = {}
        """By the key's id: a caller keeps its quota from request to request."""
        self._turn_slots = ConcurrencyLimit(services.engine.config.max_turns)
        self._body_budget = BodyBudget(BODIES_AT_ONCE * services.limits.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Lifespan only: `server_config` turns WebSockets off, which would pass here without a key.
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        # Open until `_app` returns, after the last byte of a stream: slot and bytes of the body count until then.
        with ExitStack() as resources:
            try:
                # The decoded path, which the router matches too: percent-encoding could bypass a check of the raw one.
                caller = None if is_open(scope["path"]) else await self._authenticate(scope)
                is_turn = caller is not None and self._admit(caller, scope)
                # A rejected body has used one request of the quota; only the rejection by `_occupy_slot` is refunded.
                receive = await self._read_body(caller, resources, scope, receive)
                if caller is not None and is_turn:
                    resources.enter_context(self._occupy_slot(caller))
            except ApiError as error:
                return await self._reject(error, scope, receive, send)
            scope.setdefault("state", {})["caller"] = caller
            try:
                await self._app(scope, receive, send)
            finally:
                if caller is not None and caller.key is not None:
                    # The answer has been sent: a failure to note the key's last use must not break the connection.
                    with contextlib.suppress(StoreError):
                        await self._services.memory.keys.note_use(caller.key)

    async def _read_body(self, caller: Caller | None, resources: ExitStack, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that replays the body; its bytes count against the budget until `resources` closes.

        Raises: TooLarge, BadRequest, RequestTimeout, Overloaded.
        """
        limits = self._services.limits
        max_bytes, max_seconds = limits.max_body_bytes, limits.body_seconds
        if caller is None:
            max_bytes, max_seconds = min(max_bytes, OPEN_BODY_BYTES), min(max_seconds, OPEN_BODY_SECONDS)
        # "tenant " keeps the default tenant, whose name is empty, apart from requests without a caller.
        budget_key = "" if caller is None else f"tenant {caller.tenant}"
        reserved = resources.enter_context(self._body_budget.open(budget_key))
        content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        is_json = not content_type.lower().startswith(FORM_TYPES)
        return await read_body(
            scope, receive, limits, reserved, max_bytes=max_bytes, max_seconds=max_seconds, is_json=is_json
        )

    async def _reject(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if error.status in LOAD_STATUSES:
            self._services.agent.telemetry.shed(error.code or error.type)
        await error_response(error, scope)(scope, receive, send)

    def _admit(self, caller: Caller, scope: Scope) -> bool:
        """Count the request against its quota; return whether it is a turn, which needs a slot after its body.

        Raises: Forbidden, InMaintenance, Overloaded, TooManyRequests.
        """
        path = self._route_template(scope)
        if path is not None:  # otherwise the router answers 404
            require_permission(caller, scope["method"], path)
        is_turn = (scope["method"], path) in TURNS
        if is_turn:
            self._require_serving()
            self._turn_slots.require(caller.tenant)  # before the quota: a rejected request must not use any of it
        caller.quota.admit()
        return is_turn

    def _occupy_slot(self, caller: Caller) -> AbstractContextManager[None]:
        """Return the slot of a turn whose body has been read. Raises: Overloaded, InMaintenance."""
        try:
            self._require_serving()
            self._turn_slots.require(caller.tenant)
        except ApiError:
            caller.quota.refund_request()
            raise
        return self._turn_slots.occupy(caller.tenant)

    def _require_serving(self) -> None:
        try:
            self._services.require_serving()
        except EngineInMaintenance as error:
            raise InMaintenance(str(error)) from None

    async def _authenticate(self, scope: Scope) -> Caller:
        """Return the caller of a request. Raises: Unauthorized."""
        keys = self._services.memory.keys
        await keys.refresh()
        if not keys.is_required:
            return OPERATOR
        scheme, token = _read_key(scope)
        row = keys.find(token)  # before the scheme is checked: every bad key costs the same time
        if row is None or scheme.lower() != "bearer":
            raise Unauthorized(
                "no valid API key: send `Authorization: Bearer <key>` or `x-api-key: <key>` with a key of this server",
                code="invalid_api_key",
            )
        return self._caller_for(row)

    def _caller_for(self, row: ApiKey) -> Caller:
        # The entry of a revoked key stays, but nothing leads to it: `keys.find` no longer returns its row.
        if row.id not in self._callers:
            quota = Quota(row.requests_per_minute, row.tokens_per_minute)
            self._callers[row.id] = Caller(row.tenant, frozenset(row.scopes), quota, row)
        return self._callers[row.id]

    def _route_template(self, scope: Scope) -> str | None:
        """Return the declared path of the matching route, such as `/v1/cycles/{cycle_id}`; None without a match."""
        # Linear in the routes, and matched again by the router: the permission must be known before the body is read.
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return getattr(route, "path", "")
        return None


def _read_key(scope: Scope) -> tuple[str, str]:
    """Return the scheme and the key of a request: of `Authorization`, or else of Anthropic's `x-api-key`."""
    # Reversed: of several headers of one name the first counts. Latin-1 decodes any bytes; UTF-8 would raise for a
    # hostile header.
    headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
    if b"authorization" not in headers and b"x-api-key" in headers:
        return "bearer", headers[b"x-api-key"].strip()
    scheme, _, key = headers.get(b"authorization", "").partition(" ")
    return scheme, key.strip()
