"""Which web pages may use the server: a browser sends what a foreign page tells it to.

A page of another site can reach a server on the loopback through its visitor's browser: by name, when it has its own
name resolve to 127.0.0.1, or by a form, whose request needs no permission. So a request must name a host of ours; one
that changes something must not come from a foreign page, and what it holds must be JSON, which no form sends.
Invariant: a request that is refused here has reached nothing, not even who checks keys.
"""

from __future__ import annotations

import ipaddress
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.api.errors import ApiError, BadRequest, Forbidden, Misdirected, UnsupportedMediaType, respond
from runtime.api.gateway.permissions import LINKED_PATHS
from runtime.config import ServerConfig

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
EVERY_ADDRESS = frozenset({"", "0.0.0.0", "::"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
UPLOADS = "/v1/documents"
"""Below this path, a file may come as a form does."""
JSON_TYPE = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json", re.IGNORECASE)


class OriginCheck:
    """ASGI middleware in front of everything else."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._hosts = LOOPBACK_NAMES | {host.lower() for host in (config.host, *config.allowed_hosts) if host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["path"], Headers(scope=scope))
            except ApiError as refusal:
                await respond(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = self._require_host(headers)
        # A link is itself the permission, for whoever holds it, and its page sends a form.
        if method in SAFE_METHODS or path.startswith(LINKED_PATHS):
            return
        self._require_origin(host, headers)
        require_json(path, headers)

    def _require_host(self, headers: Headers) -> str:
        """Return the host that the request names, with its port; empty where it names none, as no browser does.

        Raises: BadRequest for several; Misdirected for one that is not ours.
        """
        named = headers.getlist("host")
        if len(named) > 1:
            raise BadRequest("the request names more than one host: send one Host header", code="invalid_host")
        host = named[0].lower() if named else ""
        name = name_of(host)
        if host and name not in self._hosts and not (self._config.host in EVERY_ADDRESS and is_address(name)):
            raise Misdirected(
                f"this server does not answer as {host[:200]!r}: use an address it listens on, or put that name into "
                "server.allowed_hosts",
                code="host_not_allowed",
            )
        return host

    def _require_origin(self, host: str, headers: Headers) -> None:
        """Raise Forbidden for a request that a foreign page had a browser send."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin in self._config.cors_origins:
            return
        is_own = origin is None or origin.lower().partition("://")[2] == host
        if not is_own or site not in (None, "same-origin", "none"):
            raise Forbidden(
                f"pages of {(origin or 'other sites')[:200]!r} may not use this server: to allow one, put its origin "
                "into server.cors_origins",
                code="origin_not_allowed",
            )


def require_json(path: str, headers: Headers) -> None:
    """Raise UnsupportedMediaType for a body that is not JSON. Clients name all kinds of types for no body at all."""
    kind = headers.get("content-type", "").partition(";")[0].strip()
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if JSON_TYPE.fullmatch(kind) or not has_body:
        return
    if path.startswith(UPLOADS) and kind.lower() == "multipart/form-data":
        return
    raise UnsupportedMediaType(
        f"the body is {kind[:80]!r}, not JSON: send it with `Content-Type: application/json`",
        code="unsupported_media_type",
    )


def name_of(host: str) -> str:
    """Return a Host header without its port, and an address of IPv6 without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def is_address(name: str) -> bool:
    """Return whether a host is named by its address. No page can make its own name one."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
