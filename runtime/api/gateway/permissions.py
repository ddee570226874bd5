"""The table of all routes and the scopes that each needs, and the caller of a request.

The scope `admin` permits every route. A route marked `is_shared` acts on data that all tenants share (policies, cycles,
keys, the index) and permits only keys of the default tenant.
Invariant: a route that is missing in the table permits only administrators of the default tenant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from memory.schema import ApiKey, Scope
from runtime.api.errors import Forbidden
from runtime.api.gateway.quota import Quota


@dataclass(frozen=True)
class Caller:
    """The tenant, scopes and quota of a request. Made by `AuthMiddleware`, read by the routes."""

    tenant: str = ""
    # The default is the operator: a caller with a key must be made with all of its fields.
    scopes: frozenset[str] = frozenset({Scope.ADMIN})
    quota: Quota = field(default_factory=Quota)
    key: ApiKey | None = None

    @property
    def key_id(self) -> str | None:
        return self.key.id if self.key is not None else None


OPERATOR = Caller()
"""The caller of every request to a server without keys, which listens on the loopback only."""


@dataclass(frozen=True)
class RoutePermission:
    """The scopes that permit a route; one of them is enough."""

    scopes: frozenset[str]
    is_shared: bool = False


def _permit(*scopes: Scope, is_shared: bool = False) -> RoutePermission:
    return RoutePermission(frozenset({*scopes, Scope.ADMIN}), is_shared)


INFER, FEEDBACK, LEARN = _permit(Scope.INFER), _permit(Scope.FEEDBACK), _permit(Scope.LEARN)
READ = _permit(Scope.INFER, Scope.LEARN)
SHARED_LEARN = _permit(Scope.LEARN, is_shared=True)
OPERATE = _permit(is_shared=True)

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/redoc", "/openapi.json"})
"""Answered without a key: the health of the server and the description of its API."""
ASSET_PATHS = "/docs/assets/"
"""Answered without a key: scripts and styles of the API's description."""
LINKED_PATHS = "/feedback/"
"""Answered without a key: the token in the path is signed and states what it permits."""

# Keys are (method, path template). A new route must be added here, or only administrators can use it.
ROUTE_PERMISSIONS: dict[tuple[str, str], RoutePermission] = {
    ("POST", "/v1/chat/completions"): INFER,
    ("POST", "/v1/responses"): INFER,
    ("GET", "/v1/responses/{response_id}"): INFER,
    ("DELETE", "/v1/responses/{response_id}"): INFER,
    ("GET", "/v1/responses/{response_id}/input_items"): INFER,
    ("POST", "/v1/messages"): INFER,
    ("POST", "/v1/messages/count_tokens"): INFER,
    ("POST", "/v1/embeddings"): INFER,
    ("GET", "/v1/models"): READ,
    ("GET", "/v1/models/{model}"): READ,
    ("POST", "/v1/feedback"): FEEDBACK,
    ("POST", "/v1/feedback/links"): FEEDBACK,
    ("GET", "/v1/trajectories"): READ,
    ("GET", "/v1/trajectories/{trajectory_id}"): READ,
    ("POST", "/v1/trajectories/{trajectory_id}/close"): INFER,
    ("GET", "/v1/insights"): READ,
    ("POST", "/v1/insights/{insight_id}/approve"): LEARN,
    ("POST", "/v1/insights/{insight_id}/edit"): LEARN,
    ("POST", "/v1/insights/{insight_id}/retire"): LEARN,
    ("GET", "/v1/exemplars"): READ,
    ("POST", "/v1/exemplars/{trajectory_id}/approve"): LEARN,
    ("POST", "/v1/exemplars/{trajectory_id}/edit"): LEARN,
    ("POST", "/v1/exemplars/{trajectory_id}/retire"): LEARN,
    ("GET", "/v1/documents"): READ,
    ("POST", "/v1/documents"): LEARN,
    ("POST", "/v1/documents/upload"): LEARN,
    ("POST", "/v1/documents/search"): READ,
    ("GET", "/v1/documents/{document_id}"): READ,
    ("DELETE", "/v1/documents/{document_id}"): LEARN,
    ("GET", "/v1/examples"): READ,
    ("POST", "/v1/examples"): LEARN,
    ("DELETE", "/v1/examples"): LEARN,
    ("GET", "/v1/examples/counts"): READ,
    ("GET", "/v1/examples/{example_id}"): READ,
    ("DELETE", "/v1/examples/{example_id}"): LEARN,
    ("GET", "/v1/export/{content}"): LEARN,
    ("GET", "/v1/environments"): READ,
    ("GET", "/v1/environments/{environment}/tasks"): READ,
    ("POST", "/v1/environments/{environment}/prepare"): READ,
    ("GET", "/v1/policies"): SHARED_LEARN,
    ("GET", "/v1/policies/{version}"): SHARED_LEARN,
    ("POST", "/v1/policies/rollback"): OPERATE,
    ("POST", "/v1/policies/{version}/promote"): OPERATE,
    ("POST", "/v1/policies/{version}/rollback"): OPERATE,
    ("POST", "/v1/policies/{version}/judge"): SHARED_LEARN,
    ("POST", "/v1/cycles"): SHARED_LEARN,
    ("POST", "/v1/cycles/check"): SHARED_LEARN,
    ("GET", "/v1/cycles"): SHARED_LEARN,
    ("GET", "/v1/cycles/{cycle_id}"): SHARED_LEARN,
    ("POST", "/v1/cycles/{cycle_id}/cancel"): SHARED_LEARN,
    ("GET", "/v1/cycles/{cycle_id}/report"): SHARED_LEARN,
    ("POST", "/v1/index/rebuild"): OPERATE,
    ("GET", "/v1/doctor"): OPERATE,
    ("GET", "/metrics"): OPERATE,
    ("POST", "/v1/keys"): OPERATE,
    ("GET", "/v1/keys"): OPERATE,
    ("POST", "/v1/keys/{key_id}/revoke"): OPERATE,
}


def is_open(path: str) -> bool:
    """Return whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith((ASSET_PATHS, LINKED_PATHS))


def require_permission(caller: Caller, method: str, path: str) -> None:
    """Raise Forbidden unless the caller may use the route; `path` is the route's template."""
    permission = ROUTE_PERMISSIONS.get((method, path), OPERATE)
    if not permission.scopes & caller.scopes:
        granted = ", ".join(sorted(caller.scopes)) or "none"
        needed = " or ".join(scope.value for scope in Scope if scope in permission.scopes)
        raise Forbidden(f"{method} {path} needs the scope {needed}; this key has: {granted}", code="insufficient_scope")
    # The default tenant's name is empty.
    if permission.is_shared and caller.tenant:
        raise Forbidden(
            f"{method} {path} acts on what all tenants share: use a key of the default tenant, not of "
            f"{caller.tenant!r}",
            code="not_your_tenant",
        )


async def get_caller(request: Request) -> Caller:  # asynchronous, because FastAPI runs plain functions in a thread
    return request.state.caller


RequestCaller = Annotated[Caller, Depends(get_caller)]
"""Injects the caller: `async def route(caller: RequestCaller)`."""
